"""Commands that ask for long contexts and long answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer import Option

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import tilde
from dfqs_nb.workbook.app import (
    GGUF,
    MEASURE,
    OWN_THREADS,
    RUN,
    app,
    identity,
    model_run_dir,
    numbers,
    open_model,
    say,
    say_table,
)

BUDGET = Option(30.0, min=0, help="Work that does not fit is left out and listed.")
FRESH = Option(False, "--fresh", help="Ignore the answers of an earlier run.")


@app.command(rich_help_panel=MEASURE)
def tasks(
    model: str = GGUF,
    task: list[str] = Option(None, "--task", metavar="NAME", help="Only these tasks. Default: all."),
    lengths: str = Option("512,1024,2048,4096", help="Tokens, with commas."),
    texts: int = Option(12, min=1, help="Texts of each task at each length."),
    budget_minutes: float = BUDGET,
    run: str = RUN,
    threads: int = OWN_THREADS,
    fresh: bool = FRESH,
) -> None:
    """Ask long-context tasks in the manner of RULER and NoLiMa, at growing lengths.

    Resumes after a kill. Example: `dfqs-nb tasks model.gguf --lengths 1024,4096 --task "several keys"`
    """
    from dfqs_nb.context.cost import measure_prefill
    from dfqs_nb.context.tasks import NAME, Tasks, measure_tasks, planned_seconds
    from dfqs_nb.core.budget import duration
    from dfqs_nb.core.prompts import load_prompts

    sizes = sorted({*numbers(lengths, "--lengths")})
    if sizes[0] < 1:
        raise DfqsError(f"--lengths has {sizes[0]}", hint="give lengths of 1 or more")
    with open_model(model, sizes[-1], threads) as opened:
        n_tasks = len({*(task or load_prompts(NAME, Tasks).tasks)})
        speed = measure_prefill(opened, sizes[-1], 60 * budget_minutes)
        planned = duration(planned_seconds(speed, sizes, n_tasks, texts))
        asked = f"{n_tasks} tasks, {texts} texts each at {lengths} tokens"
        say(f"{asked}: about {planned}, at most {budget_minutes:g} min")
        folder = model_run_dir(run, model, "long_context")
        options: dict[str, Any] = {"tasks": task or [], "n_texts": texts, "fresh": fresh}
        options |= {"budget_seconds": 60 * budget_minutes, "model_id": identity(opened)}
        result = measure_tasks(opened, folder, sizes, speed, **options)
    _tell(result, folder / "tasks.csv", model, "raise --budget-minutes, or take longer --lengths")
    if result.ended:
        say(f"no answer is right at {sizes[0]:,} tokens, so not asked at more: {'; '.join(result.ended)}")
    say_table(result.effective(), ".2f")


@app.command(rich_help_panel=MEASURE)
def loops(
    model: str = GGUF,
    temperature: str = Option("0,1", help="Values with commas."),
    cache_type: str = Option("f16,q8_0", help="Types of keys and values, with commas."),
    answers: int = Option(12, min=1, max=24, help="Answers under each condition."),
    tokens: int = Option(512, min=64, help="Tokens of a long answer."),
    budget_minutes: float = BUDGET,
    run: str = RUN,
    threads: int = OWN_THREADS,
    fresh: bool = FRESH,
) -> None:
    """Ask for long answers, and say how many fall into a repeat, by temperature and cache type.

    Resumes after a kill. Example: `dfqs-nb loops model.gguf --temperature 0,0.6 --cache-type f16,q4_0`
    """
    from dfqs_nb.context.loops import measure_loops
    from dfqs_nb.llama import OpenSettings

    options: dict[str, Any] = {"temperatures": numbers(temperature, "--temperature", float)}
    settings = OpenSettings.of(model, n_ctx=tokens + 512, n_threads=threads)
    folder = model_run_dir(run, model, "long_context")
    options |= {"cache_types": cache_type.split(","), "n_answers": answers, "n_tokens": tokens}
    options |= {"budget_seconds": 60 * budget_minutes, "fresh": fresh}
    result = measure_loops(model, folder, settings, **options)
    _tell(result, folder / "loops.csv", model, "raise --budget-minutes")


def _tell(result: Any, path: Path, model: str, hint: str) -> None:
    """Print a result's table and what was left out, and write its items."""
    from dfqs_nb.core.files import write_table

    if not len(result.items):
        raise DfqsError(f"nothing was asked: {'; '.join(result.left_out)}", where=model, hint=hint)
    say_table(result.table(), ".2f")
    say("\n".join(f"left out: {what}" for what in result.left_out))
    say(f"wrote {tilde(write_table(path, result.items, index=False))}")
