"""Commands that ask for long contexts and long answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import run_dir, tilde
from dfqs_nb.workbook.cli import MEASURE, app, numbers, say

Model = Annotated[str, typer.Argument(help="A GGUF file, or any of its shards.")]
Budget = Annotated[float, typer.Option(min=0, help="What does not fit is left out, and named.")]
Run = Annotated[str, typer.Option(help="The folder under outputs/. Default: from the model.")]
Threads = Annotated[int, typer.Option(help="0: as suits the model.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ask again what an earlier run asked.")]


@app.command(rich_help_panel=MEASURE)
def tasks(
    model: Model,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Only these tasks. Default: all.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, with commas.")] = "512,1024,2048,4096",
    texts: Annotated[int, typer.Option(min=1, help="Texts of a task at a length.")] = 12,
    budget_minutes: Budget = 30.0,
    run: Run = "",
    threads: Threads = 0,
    fresh: Fresh = False,
) -> None:
    """Ask long-context tasks in the manner of RULER and NoLiMa, at growing lengths.

    Goes on after a kill. Example: `dfqs-nb tasks model.gguf --lengths 1024,4096 --task "several keys"`
    """
    from dfqs_nb import llama
    from dfqs_nb.context.tasks import NAME, Tasks, measure_tasks, planned_seconds
    from dfqs_nb.core.budget import duration
    from dfqs_nb.core.files import sha256_of
    from dfqs_nb.core.prompts import load_prompts

    sizes = sorted(numbers(lengths, "--lengths"))
    if sizes[0] < 1:
        raise DfqsError(f"--lengths has {sizes[0]}", hint="give lengths of 1 or more")
    settings = llama.OpenSettings.of(model, n_ctx=sizes[-1], n_threads=threads)
    with llama.open_model(model, settings) as opened:
        n_tasks = len(task or load_prompts(NAME, Tasks).tasks)
        planned = duration(planned_seconds(opened, sizes, n_tasks, texts))
        asked = f"{n_tasks} tasks, {texts} texts each at {lengths} tokens"
        say(f"{asked}: about {planned}, at most {budget_minutes:g} min")
        folder = _folder(run, model)
        result = measure_tasks(
            opened,
            folder,
            sizes,
            tasks=task or [],
            n_texts=texts,
            budget_seconds=60 * budget_minutes,
            model_id=sha256_of(opened.path),
            fresh=fresh,
        )
    _tell(result, folder / "tasks.csv", model, "raise --budget-minutes, or take longer --lengths")
    say(result.effective().to_string(index=False, float_format="{:.2f}".format))


@app.command(rich_help_panel=MEASURE)
def loops(
    model: Model,
    temperature: Annotated[str, typer.Option(help="Values with commas.")] = "0,1",
    cache_type: Annotated[str, typer.Option(help="Of keys and values, with commas.")] = "f16,q8_0",
    answers: Annotated[int, typer.Option(min=1, max=24, help="Of each condition.")] = 12,
    tokens: Annotated[int, typer.Option(min=64, help="Of a long answer.")] = 512,
    budget_minutes: Budget = 30.0,
    run: Run = "",
    threads: Threads = 0,
    fresh: Fresh = False,
) -> None:
    """Ask for long answers, and say how many fall into a repeat, by temperature and cache type.

    Goes on after a kill. Example: `dfqs-nb loops model.gguf --temperature 0,0.6 --cache-type f16,q4_0`
    """
    from dfqs_nb.context.loops import measure_loops
    from dfqs_nb.llama import OpenSettings

    temperatures = numbers(temperature, "--temperature", float)
    settings = OpenSettings.of(model, n_ctx=tokens + 512, n_threads=threads)
    folder = _folder(run, model)
    result = measure_loops(
        model,
        folder,
        settings,
        temperatures=temperatures,
        cache_types=cache_type.split(","),
        n_answers=answers,
        n_tokens=tokens,
        budget_seconds=60 * budget_minutes,
        fresh=fresh,
    )
    _tell(result, folder / "loops.csv", model, "raise --budget-minutes")


def _folder(run: str, model: str) -> Path:
    from dfqs_nb.workbook.run import default_run_name

    folder = run_dir(run or default_run_name(model)) / "long_context"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tell(result: Any, path: Path, model: str, hint: str) -> None:
    """Print a result's table and what was left out, and write its items."""
    from dfqs_nb.core.files import write_table

    if not len(result.items):
        raise DfqsError(f"nothing was asked: {'; '.join(result.left_out)}", where=model, hint=hint)
    say(result.table().to_string(index=False, float_format="{:.2f}".format))
    say("\n".join(f"left out: {what}" for what in result.left_out))
    say(f"wrote {tilde(write_table(path, result.items, index=False))}")
