# Written by `dfqs-nb deploy`: serve the model on this machine only. Stop it with Ctrl+C.
$model = {{ model }}
if (-not (Test-Path -LiteralPath $model)) { throw "put the file (and its other shards) at $model" }
{% if key %}
$env:LLAMA_API_KEY = [Environment]::GetEnvironmentVariable({{ key }})
{% endif %}
llama-server --model $model --alias {{ name }} --ctx-size {{ n_ctx }} --parallel 1 --threads {{ n_threads }} {{ placement }} --jinja --no-repack --host {{ host }} --port {{ port }}
