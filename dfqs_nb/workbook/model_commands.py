"""Commands that measure a model: its routing, its scores, and recipes to run it elsewhere."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import run_dir, tilde
from dfqs_nb.workbook.cli import MEASURE, app, numbers, say

KeyVariable = Annotated[
    str, typer.Option(metavar="NAME", help="The environment variable that holds the server's key.")
]
COLUMNS = "condition against n_choices n_differ margin_differ logits_equal logit_drift same_output status"


class Tier(StrEnum):
    """Which question sets: small ones for the reference model, or those for real models."""

    NANO = "nano"
    STANDARD = "standard"


class Thinking(StrEnum):
    """Whether a model that can think does: as its chat template has it, always, or never."""

    TEMPLATE = "template"
    ON = "on"
    OFF = "off"


@app.command(rich_help_panel=MEASURE)
def routing(
    model: Annotated[str, typer.Argument(help="A name of `dfqs-nb models`, or a file.")],
    run: Annotated[str, typer.Option(help="The folder under outputs/ for traces and tables.")] = "routing",
    tokens: Annotated[int, typer.Option(help="Length of the text.")] = 384,
    other: Annotated[str, typer.Option(metavar="MODEL", help="Another quantization to compare with.")] = "",
    texts: Annotated[str, typer.Option(metavar="FOLDER", help="Your texts, a subfolder a domain.")] = "",
    budget_minutes: Annotated[
        float, typer.Option(min=0, help="Shorten and leave out runs. 0: no bound.")
    ] = 0.0,
    export: Annotated[str, typer.Option(metavar="FILE.csv", help="Write the traces as a table.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Record again what an earlier run left.")] = False,
) -> None:
    """Say whether routing is deterministic, alone and under load, and which settings change it.

    Exit status 1: it is not. Example: `dfqs-nb routing model.gguf --export trace.csv.gz`
    """
    from dfqs_nb.gguf import models as registry
    from dfqs_nb.routing import run_experiment
    from dfqs_nb.serve import check_in_process

    check_in_process(model, "routing")
    path, folder = registry.resolve(model)[0], run_dir(run)
    options: dict[str, Any] = {"fresh": fresh, "other": other, "texts": texts, "export": export}
    experiment = run_experiment(
        path, folder / "routing", n_tokens=tokens, budget_minutes=budget_minutes, **options
    )
    table = experiment.table.reindex(columns=COLUMNS.split())
    table = table[~table["condition"].isin(experiment.left_out)]
    say(table.to_string(index=False, float_format="{:.3g}".format))
    say("\n".join(["", *experiment.conclusions(), "", *experiment.advice, ""]))
    for row in experiment.claims().itertuples():
        say(f'"{row.claim}": {row.status}\n  {row.evidence}')
    written = experiment.write_tables(folder)
    say(f"\nwrote {', '.join(path.name for path in written)} to {tilde(folder)}/")
    raise typer.Exit(int(not experiment.passed))


@app.command(rich_help_panel=MEASURE)
def score(
    model: Annotated[
        str, typer.Argument(help="A GGUF file, any of its shards, or the URL of a server.")
    ] = "",
    endpoint: Annotated[str, typer.Option(metavar="URL", help="Score this server, not a file.")] = "",
    endpoint_model: Annotated[str, typer.Option(metavar="NAME", help="Which of the server's models.")] = "",
    key_variable: KeyVariable = "",
    concurrency: Annotated[
        int, typer.Option(help="Requests at once to a server; more than 1 can change answers.")
    ] = 1,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NEW", help="A server's name of a request's field; `seed=` leaves it out."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a piece of a server's answer.")] = 600.0,
    tier: Annotated[Tier, typer.Option(help="Which question sets.")] = Tier.STANDARD,
    set_names: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME", help="Only these sets, or JSONL files.")
    ] = None,
    n_ctx: Annotated[int, typer.Option(help="Tokens of context.")] = 4096,
    threads: Annotated[int, typer.Option(help="0: the usable cores.")] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions a set; nothing is scored then.")
    ] = None,
    run: Annotated[str, typer.Option(help="The folder under outputs/. Default: from the model.")] = "",
    samples: Annotated[int, typer.Option(help="Answers a question; of code, pass@k up to that k.")] = 1,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Counts above temperature 0.")] = 0.95,
    thinking: Annotated[Thinking, typer.Option(help="What the chat template is told.")] = Thinking.TEMPLATE,
    thinking_tokens: Annotated[int, typer.Option(help="For the thinking, beside a set's own limit.")] = 0,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Of a server: also retrieval at growing lengths.")
    ] = False,
    longest: Annotated[int, typer.Option(metavar="TOKENS", help="The longest of them.")] = 1024,
    shortest: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="The shortest. Default: the prompt set's.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Answer again what an earlier run answered.")
    ] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="Run generated code without a sandbox.")
    ] = False,
) -> None:
    """Score a model's reasoning and code; goes on after a kill.

    Examples: `dfqs-nb score model.gguf`, `dfqs-nb score http://127.0.0.1:8080/v1 --tier nano`
    """
    from dfqs_nb import llama, serve
    from dfqs_nb.core.files import sha256_of
    from dfqs_nb.merge.merge import earlier_result
    from dfqs_nb.scores import ItemSet, Options
    from dfqs_nb.scores import score_set as score_model
    from dfqs_nb.workbook.run import default_run_name

    url = endpoint or (model if serve.is_url(model) else "")
    if bool(endpoint) == bool(model):
        raise DfqsError("say what to score", hint="give a GGUF file, or --endpoint URL, and not both")
    if long_context and not url:
        hint = f"of a file, notebook 05 measures it: `dfqs-nb run 01 05 --model {quoted(model)}`"
        raise DfqsError("--long-context is for a server", where=model, hint=hint)
    sets = [ItemSet.load(name) for name in set_names or []] or ItemSet.of_tier(tier)
    options = Options(
        temperature=temperature,
        top_p=top_p,
        n_samples=samples,
        ks=tuple(k for k in (10, 100) if k <= samples),
        thinking=thinking.value,
        thinking_tokens=thinking_tokens,
        limit=limit,
        allow_unsandboxed=allow_unsandboxed,
        fresh=fresh,
    )
    with ExitStack() as stack:
        if url:
            opened: Any = serve.connect(
                url,
                endpoint_model,
                key_variable=key_variable,
                concurrency=concurrency,
                timeout_seconds=timeout,
                fields=dict(_renamed(name) for name in field or []),
            )
            identity, name = "", Path(f"endpoint-{opened.model}").name
            score_set: Any = serve.score_set
        else:
            settings = llama.OpenSettings(n_ctx=n_ctx, n_threads=threads or None)
            opened = stack.enter_context(llama.open_model(model, settings))
            earlier = earlier_result(opened.path)  # made here: its manifest has the hash
            identity, name = earlier.sha256 if earlier else sha256_of(opened.path), default_run_name(model)
            score_set = score_model
        folder = run_dir(run or name)
        for item_set in sets:
            result = score_set(opened, item_set, folder / "scores", options, model_id=identity)
            say("\n".join(part.sentence for part in (result.score, *result.pass_at.values())))
        if long_context:
            _long_context(opened, folder / "long_context", tier, longest, shortest, fresh)
    say(f"answers: {tilde(folder / 'scores')}/")


def _renamed(given: str) -> tuple[str, str]:
    """A field's name and the server's name of it.

    >>> _renamed("max_tokens=max_completion_tokens"), _renamed("seed=")
    (('max_tokens', 'max_completion_tokens'), ('seed', ''))
    """
    name, equals, new = given.partition("=")
    if not name or not equals:
        raise DfqsError(f"--field {given} has no `=`", hint=f"--field {name or 'seed'}= leaves it out")
    return name, new


def _long_context(
    server: Any, folder: Path, tier: str, longest: int, shortest: int | None, fresh: bool
) -> None:
    """The curve of retrieval over an endpoint, and where it ends."""
    from dfqs_nb import serve

    result = serve.measure_long_context(
        server, folder, prompt_set=tier, longest=longest, shortest=shortest, fresh=fresh
    )
    if result.failure:
        say(f"{result.failure.length:,} tokens: {result.failure.message}")
    if len(result.items):
        columns = ["length", "correct", "n", "accuracy", "low", "high", "curve"]
        say(result.curve()[columns].to_string(index=False, float_format="{:.3f}".format))
        say(f"retrieval {result.boundary().sentence}")
    say(f"haystacks: {tilde(folder)}/")


@app.command(rich_help_panel=MEASURE)
def bench(
    model: Annotated[str, typer.Argument(help="A GGUF file, or any of its shards.")],
    threads: Annotated[str, typer.Option(help="Values with commas. Default: 1, 2, 4 ... to all cores.")] = "",
    batch: Annotated[str, typer.Option(help="n_batch.")] = "512",
    ubatch: Annotated[str, typer.Option(help="n_ubatch.")] = "512",
    cache_type: Annotated[str, typer.Option(help="Of keys and values, as f16,q8_0.")] = "f16",
    flash_attn: Annotated[str, typer.Option(help="0, 1, or 0,1.")] = "0",
    gpu_layers: Annotated[str, typer.Option(help="Layers on the GPU; -1: all.")] = "0",
    prompt: Annotated[int, typer.Option(min=0, help="Tokens of prefill to time; 0: none.")] = 512,
    gen: Annotated[int, typer.Option(min=0, help="Tokens of decode to time; 0: none.")] = 128,
    depth: Annotated[str, typer.Option(help="Tokens in the context before.")] = "0",
    rounds: Annotated[int, typer.Option(min=1, help="Each times every setting once.")] = 5,
    budget_minutes: Annotated[float, typer.Option(help="No round begins that would exceed it.")] = 10.0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write a .csv, .json or .md file.")
    ] = None,
) -> None:
    """Time a model under many settings, in llama-bench's columns, and name the fastest.

    Example: `dfqs-nb bench model.gguf --threads 4,8,16 --flash-attn 0,1`
    """
    from dfqs_nb.core.display import markdown_table
    from dfqs_nb.core.files import write_text
    from dfqs_nb.core.machine import usable_cores, watched_load
    from dfqs_nb.llama import OpenSettings
    from dfqs_nb.llama import bench as benches

    if output and output.suffix not in (".csv", ".json", ".md"):
        raise DfqsError("its name says no format", where=output, hint="end it in .csv, .json or .md")
    cores = usable_cores()
    doubling = ",".join(str(n) for n in sorted({*(2**k for k in range(cores.bit_length())), cores}))
    axes: dict[str, Any] = {
        "n_threads": numbers(threads or doubling, "--threads"),
        "n_batch": numbers(batch, "--batch"),
        "n_ubatch": numbers(ubatch, "--ubatch"),
        "cache_type": cache_type.split(","),
        "flash_attn": [bool(value) for value in numbers(flash_attn, "--flash-attn")],
        "n_gpu_layers": numbers(gpu_layers, "--gpu-layers"),
    }
    cases = benches.grid(OpenSettings(), axes, prompt, gen, numbers(depth, "--depth"))
    say(f"{len(cases)} tests: one round, then up to {rounds - 1} more within {budget_minutes:g} minutes")
    with watched_load() as load:
        result = benches.run(model, cases, rounds, budget_minutes)
    table = result.table()
    shown = ["n_threads", "n_batch", "n_ubatch", "type_k", "flash_attn", "n_gpu_layers"]
    varied = [name for name in shown if table[name].nunique() > 1] or ["n_threads"]
    text = table.assign(test=[case.name for at, case in enumerate(result.cases) if at in result.seconds])
    say(text[[*varied, "test", "avg_ts", "stddev_ts"]].to_string(index=False, float_format="{:.1f}".format))
    energy = table["joules_per_token"]
    say(
        "energy: not readable here"
        if energy.isna().all()
        else f"energy: {energy.min():.2f} J a token at best"
    )
    busy = ["contended: other processes were busy, so the speeds are too low"] if load.contended else []
    say(
        "\n".join([*result.advice(), *busy, *(f"left out: {reason}" for reason in {*result.failed.values()})])
    )
    if output:
        made = {
            ".csv": table.to_csv(index=False),
            ".json": table.to_json(orient="records", indent=2),
            ".md": markdown_table(table) + "\n",
        }
        say(f"wrote {tilde(write_text(output, made[output.suffix]))}")


@app.command(rich_help_panel=MEASURE)
def choices(
    model: Annotated[str, typer.Argument(help="A GGUF file, or any of its shards.")],
    set_name: Annotated[
        str, typer.Option("--set", metavar="NAME", help="A reasoning set, or a JSONL file of choices.")
    ] = "standard-reasoning",
    run: Annotated[str, typer.Option(help="The folder under outputs/. Default: from the model.")] = "",
    n_ctx: Annotated[int, typer.Option(help="Tokens of context.")] = 4096,
    threads: Annotated[int, typer.Option(help="0: as suits the model.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first questions.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Score again what an earlier run scored.")] = False,
) -> None:
    """Answer multiple choice by log-likelihood, and write the result as lm-evaluation-harness does.

    Goes on after a kill. Example: `dfqs-nb choices model.gguf --set questions.jsonl`
    """
    from dfqs_nb import llama
    from dfqs_nb.core.files import sha256_of
    from dfqs_nb.scores import likelihood
    from dfqs_nb.workbook.run import default_run_name

    questions = likelihood.ChoiceSet.load(set_name)
    folder = run_dir(run or default_run_name(model)) / "scores"
    settings = llama.OpenSettings.of(model, n_ctx=n_ctx, n_threads=threads)
    with llama.open_model(model, settings) as opened:
        identity = sha256_of(opened.path)
        result = likelihood.answer(opened, questions, folder, model_id=identity, limit=limit, fresh=fresh)
    say(result.sentence)
    say(result.families().to_string(index=False, float_format="{:.3f}".format))
    say(f"wrote {tilde(result.save(folder / f'{questions.head.set}.lm_eval.json'))}")


@app.command(rich_help_panel=MEASURE)
def record(
    source: Annotated[str, typer.Argument(help="The original: a GGUF file, or the URL of a server.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The record, a JSONL file.")],
    prompts: Annotated[
        str, typer.Option(help="A question set, or a text file with a prompt on each line.")
    ] = "standard-reasoning",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    top: Annotated[int, typer.Option(min=1, help="Likeliest tokens to keep at each.")] = 20,
    limit: Annotated[int, typer.Option(help="The most prompts; 0: all.")] = 32,
    plain: Annotated[bool, typer.Option("--plain", help="Continue texts; no chat template.")] = False,
    endpoint_model: Annotated[str, typer.Option(metavar="NAME", help="Which of the server's models.")] = "",
    key_variable: KeyVariable = "",
    n_ctx: Annotated[int, typer.Option(help="Tokens of context.")] = 4096,
    licence: Annotated[str, typer.Option(help="Of prompts and answers, for the record.")] = "not stated",
) -> None:
    """Record a model's predictions, so that its quantizations can be compared where it is not.

    Goes on after a kill. Example: `dfqs-nb record http://127.0.0.1:8080/v1 -o original.jsonl`
    """
    from dfqs_nb import llama, serve
    from dfqs_nb.core.files import sha256_of
    from dfqs_nb.ladder import fidelity
    from dfqs_nb.serve.logprobs import continuation

    asked = fidelity.load_prompts(prompts, limit, chat=not plain)
    if serve.is_url(source):
        server = serve.connect(source, endpoint_model, key_variable=key_variable)
        name, facts = server.model, {"runtime": server.conditions()["runtime"]}
        steps: Any = partial(continuation, server, n_tokens=tokens, top_k=top)
    else:
        model = llama.open_model(source, llama.OpenSettings.of(source, n_ctx=n_ctx))
        name, steps = model.path.name, partial(fidelity.continuation, model, n_tokens=tokens, top_k=top)
        facts = {"runtime": model.conditions()["runtime"], "source_sha256": sha256_of(model.path)}
    fidelity.write_record(
        output, asked, steps, source=name, top_k=top, licence=licence, conditions={"tokens": tokens}, **facts
    )
    say(f"wrote {tilde(output)}; now compare: dfqs-nb fidelity MODEL {shlex.quote(str(output))}")


@app.command(rich_help_panel=MEASURE)
def fidelity(
    model: Annotated[str, typer.Argument(help="The quantization: a GGUF file, or any of its shards.")],
    record: Annotated[Path, typer.Argument(help="What the command record wrote of the original.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write a row a token, as CSV.")
    ] = None,
    n_ctx: Annotated[int, typer.Option(help="Tokens of context.")] = 4096,
    threads: Annotated[int, typer.Option(help="0: the usable cores.")] = 0,
) -> None:
    """Compare a quantization with an original that is not here, from a record of its predictions.

    Example: `dfqs-nb fidelity model-IQ2_XXS.gguf original.jsonl`
    """
    from dfqs_nb import llama
    from dfqs_nb.core.files import write_table
    from dfqs_nb.ladder import fidelity as compared

    loaded = compared.Record.load(record)
    settings = llama.OpenSettings.of(model, n_ctx=n_ctx, n_threads=threads)
    with llama.open_model(model, settings) as opened:
        result = compared.compare_record(opened, loaded)
    say(result.sentence)
    if result.aligned:
        say(result.by_position().to_string(index=False, float_format="{:.4f}".format))
    if output:
        say(f"wrote {tilde(write_table(output, result.tokens, index=False))}")


@app.command(rich_help_panel=MEASURE)
def deploy(
    target: Annotated[str, typer.Argument(help="A program; see --list.")] = "",
    model: Annotated[
        str, typer.Argument(help="A file, a name of `dfqs-nb models`, or hf://... (not downloaded).")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: deploy-TARGET under outputs/.")
    ] = None,
    n_ctx: Annotated[
        int | None, typer.Option(help="Tokens of context. Default: what this machine holds.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Default: the usable cores.")] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Default: what this machine's GPU holds.")] = None,
    port: Annotated[int | None, typer.Option(help="Of the server. Default: the target's own.")] = None,
    key_variable: KeyVariable = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier recipe.")] = False,
    list_targets: Annotated[bool, typer.Option("--list", help="The targets, and what ran here.")] = False,
    table: Annotated[bool, typer.Option("--table", help="All that is known of them, as Markdown.")] = False,
) -> None:
    """Write the files and commands that run a model with another program.

    Examples: `dfqs-nb deploy --list`, `dfqs-nb deploy ollama model.gguf`
    """
    from dfqs_nb.serve import recipes

    if table or list_targets:
        say((recipes.table_text() if table else recipes.list_text()).rstrip("\n"))
        return
    if not (target and model):
        raise DfqsError("a target and a model are needed", hint="see `dfqs-nb deploy --list`")
    recipes.target_of(target)
    recipe = recipes.write_recipe(
        target,
        model,
        output or run_dir(f"deploy-{target}"),
        n_ctx=n_ctx,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        port=port,
        key_variable=key_variable,
        overwrite=overwrite,
    )
    say("\n".join([*(f"- {note}" for note in recipe.notes), "", *recipe.commands]))
    say(f"\nwrote {', '.join(tilde(path) for path in recipe.files)}")
