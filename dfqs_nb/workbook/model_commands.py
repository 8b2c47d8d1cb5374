"""Commands that measure a model (routing, scores, long contexts), and that deploy it."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import typer
from typer import Argument, Option

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_json, write_table
from dfqs_nb.core.paths import outputs_dir, run_dir, tilde
from dfqs_nb.workbook import cli, file_commands  # noqa: F401 (its commands are listed before these)
from dfqs_nb.workbook.cli import MEASURE, Context, Fresh, Gguf, Run, Threads, app, say, say_table

COLUMNS = "condition against n_choices n_differ margin_differ logits_equal logit_drift same_output"


def open_model(model: str, n_ctx: int, threads: int = 0) -> Any:
    """Open a model with settings that suit it and this machine."""
    from dfqs_nb import gguf, llama

    shards = gguf.shards.open_shards(model)
    return llama.open_model(shards, llama.OpenSettings.of(shards, n_ctx=n_ctx, n_threads=threads))


def identity(model: Any) -> str:
    """SHA-256 of an open model: from its manifest, where that is ours and holds, else read anew."""
    from dfqs_nb.merge.merge import earlier_result

    earlier = earlier_result(model.path)
    return earlier.sha256 if earlier else str(model.sha256())


@app.command(rich_help_panel=MEASURE)
def routing(
    model: str = Argument(..., help="A name of `dfqs-nb models`, or a file."),
    run: str = Option("routing", help="The folder under outputs/ for traces and tables."),
    tokens: int = Option(384, help="Length of the text."),
    texts: str = Option("", metavar="FOLDER", help="Your texts, in a subfolder for each domain."),
    budget_minutes: float = Option(0.0, min=0, help="Runs are shortened or left out to fit. 0: no limit."),
    fresh: Fresh = False,
) -> None:
    """Say whether routing is deterministic, and what changes it.

    Exit status 1: routing is not deterministic. Example: `dfqs-nb routing model.gguf --tokens 1024`
    """
    from dfqs_nb import gguf
    from dfqs_nb.routing import run_experiment
    from dfqs_nb.routing.verdict import failures
    from dfqs_nb.serve import check_in_process

    check_in_process(model, "routing")
    shards = gguf.shards.open_shards(gguf.models.resolve(model)[0])  # what is no model gets no folder
    folder = run_dir(run)
    options: dict[str, Any] = {"n_tokens": tokens, "texts": texts, "fresh": fresh}
    experiment = run_experiment(shards, folder / "routing", budget_minutes=budget_minutes, **options)
    say_table(experiment.sensitivities[COLUMNS.split()], ".3g")
    say(*failures(experiment.rows), *experiment.conclusions(), "", *experiment.advice, "")
    say(*(f'"{row.claim}": {row.status}\n  {row.evidence}' for row in experiment.claims().itertuples()), "")
    cli.say_written(experiment.write_tables(folder), folder)
    raise typer.Exit(int(not experiment.passed))


@app.command(rich_help_panel=MEASURE)
def score(
    model: str = Argument(..., help="A GGUF file, any of its shards, or the URL of a server."),
    endpoint_model: cli.ServerModel = "",
    key_variable: cli.KeyVariable = "",
    timeout: float = Option(3600.0, min=1, help="Seconds to wait for an answer of a server."),
    tier: Literal["nano", "standard"] = Option("standard", help="Which question sets."),
    set_names: list[str] = Option([], "--set", metavar="NAME", help="Only these sets, or JSONL files."),
    n_ctx: Context = 4096,
    threads: Threads = 0,
    limit: int = Option(0, min=0, help="Questions a set, evenly from its families. 0: all."),
    budget_minutes: float = Option(0.0, min=0, help="No question is asked after that. 0: no limit."),
    run: Run = "",
    temperature: float = Option(0.0, help="0: greedy."),
    thinking: Literal["template", "on", "off"] = Option("template", help="What the chat template is told."),
    thinking_tokens: int = Option(0, help="Extra tokens for thinking, on top of a set's own limit."),
    fresh: Fresh = False,
    allow_unsandboxed: bool = Option(False, "--allow-unsandboxed", help="Run code without a sandbox."),
) -> None:
    """Score the reasoning and code of a model or a server.

    Multiple choice is answered by log-likelihood, which no server shows. Resumes after a kill, and
    notebook 06 of the same run takes the answers over where its settings are the same.
    Examples: `dfqs-nb score model.gguf`, `dfqs-nb score http://127.0.0.1:8080/v1 --tier nano`
    """
    from dfqs_nb import scores, serve
    from dfqs_nb.workbook.run import default_run_name

    if set_names:
        sets = scores.ItemSet.load_all(set_names)
    else:
        sets = scores.ItemSet.of_tier(tier, choices=not serve.is_url(model))
    given: dict[str, Any] = {"temperature": temperature, "limit": limit, "fresh": fresh}
    given |= {"thinking": thinking, "thinking_tokens": thinking_tokens}
    options = scores.Options(**given, allow_unsandboxed=allow_unsandboxed)
    with ExitStack() as stack:
        if serve.is_url(model):
            wire: dict[str, Any] = {"key_variable": key_variable, "timeout_seconds": timeout}
            opened: Any = serve.connect(model, endpoint_model, **wire)
            model_id, folder = "", run_dir(run or Path(f"endpoint-{opened.model}").name)
            score_set: Any = serve.measure.score_set
        else:
            opened = stack.enter_context(open_model(model, n_ctx, threads))
            model_id, folder = identity(opened), run_dir(run or default_run_name(model))
            score_set = scores.score_set
        place, runs = folder / "scores", []
        end = time.monotonic() + (60 * budget_minutes or math.inf)
        for number, item_set in enumerate(sets):
            share = (end - time.monotonic()) / (len(sets) - number)
            timed = replace(options, until=time.monotonic() + share)
            runs.append(score_set(opened, item_set, place, timed, model_id=model_id))
            say(runs[-1].score.sentence)
        results = [vars(run.score) | {"conditions": run.conditions} for run in runs]
        say(f"wrote {tilde(write_json(place / 'results.json', results))}; the answers are beside it")


@app.command(rich_help_panel=MEASURE)
def record(
    model: Gguf,
    output: Path = Option(..., "-o", "--output", help="The record, a JSONL file."),
    prompts: str = Option(
        "standard-reasoning", metavar="SET", help="A question set, or a JSONL file of one."
    ),
    tokens: int = Option(64, min=1, help="Tokens of each answer."),
    limit: int = Option(32, min=1, help="The largest number of prompts."),
    n_ctx: Context = 4096,
    threads: Threads = 0,
) -> None:
    """Record an original's predictions, to judge quantizations by them.

    Resumes after a kill. Example: `dfqs-nb record model-F16.gguf -o original.jsonl`
    """
    from dfqs_nb.ladder import fidelity
    from dfqs_nb.scores import ItemSet

    questions = ItemSet.load(prompts).part(limit)
    with open_model(model, n_ctx, threads) as opened:
        fidelity.write_record(opened, questions, output, n_tokens=tokens, sha256=identity(opened))
    say(f"wrote {tilde(output)}; now compare: dfqs-nb fidelity MODEL {shlex.quote(str(output))}")


@app.command(rich_help_panel=MEASURE)
def fidelity(
    model: Gguf,
    record: Path = Argument(..., help="The record of the original's predictions, a JSONL file."),
    output: Path | None = Option(None, "-o", "--output", help="Also write a CSV with a row for each token."),
    n_ctx: Context = 4096,
    threads: Threads = 0,
) -> None:
    """Compare a quantization with the record of its original.

    Example: `dfqs-nb fidelity model-IQ2_XXS.gguf original.jsonl`
    """
    from dfqs_nb.ladder import fidelity as compared

    loaded = compared.Record.load(record)
    with open_model(model, n_ctx, threads) as opened:
        result = compared.compare_record(opened, loaded)
    n_prompts = result["id"].nunique()
    say(f"against {loaded.head.source}: {n_prompts} prompts, {len(result):,} tokens; 95 % intervals")
    say_table(compared.summary(result), ".4f")
    if output:
        say(f"wrote {tilde(write_table(output, result, index=False))}")


@app.command(rich_help_panel=MEASURE)
def deploy(
    target: str = Argument("", help="A program. Without one: list them, and which versions ran here."),
    model: str = Argument("", help="A file, a name of `dfqs-nb models`, or hf://... (not downloaded)."),
    output: Path | None = Option(None, "-o", "--output", help="Default: deploy-TARGET under outputs/."),
    n_ctx: int | None = Option(None, help="Tokens of context. Default: what this machine holds."),
    gpu_layers: int | None = Option(None, help="Default: what this machine's GPU holds."),
    port: int | None = Option(None, min=1, max=65535, help="Port of the server. Default: the target's own."),
    key_variable: cli.KeyVariable = "",
    overwrite: cli.Overwrite = False,
) -> None:
    """Write what runs a model with another program.

    Examples: `dfqs-nb deploy`, `dfqs-nb deploy ollama model.gguf`
    """
    from dfqs_nb.serve import recipes

    if not target:
        for row in recipes.targets_table().itertuples():
            say(f"{row.target:<22}{row.title:<24}{row.run_here}")
        return
    if not model:
        raise DfqsError("no model was named", hint=f"dfqs-nb deploy {quoted(target)} MODEL")
    sizes: dict[str, Any] = {"n_ctx": n_ctx, "n_gpu_layers": gpu_layers, "port": port}
    folder = output or outputs_dir() / f"deploy-{target}"
    recipe = recipes.write_recipe(
        target, model, folder, **sizes, key_variable=key_variable, overwrite=overwrite
    )
    say(*(f"- {note}" for note in recipe.notes), "", *recipe.commands)
    say(f"\nwrote {', '.join(tilde(path) for path in recipe.files)}")
