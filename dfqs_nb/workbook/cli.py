"""The program ``dfqs-nb``: its commands but those of `file_commands`, and the place where every error ends.

Other packages are imported inside the functions, so that a fast command starts fast.
"""

from __future__ import annotations

import atexit
import errno
import gc
import math
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from dfqs_nb import __version__
from dfqs_nb.core.display import counted, did_you_mean, one_line, plain, quoted
from dfqs_nb.core.errors import DfqsError, OutputError
from dfqs_nb.core.files import canonical_sha256, check_output, write_json, write_table, write_text
from dfqs_nb.core.paths import outputs_dir, run_dir, tilde
from dfqs_nb.workbook import terminal
from dfqs_nb.workbook.terminal import MEASURE, REPORT, WHOLE, Overwrite, app, say, say_table

LOG, INTERRUPTED = "dfqs-nb-error.log", 130
USAGE: Any = typer.BadParameter.__base__  # of the click that this typer stands on, its own or the installed
RIGHTS = "; check its rights, or take another folder (for runs, set DFQS_OUTPUTS)"
FULL = "; free some space, or take a folder of another disk (for runs, set DFQS_OUTPUTS)"
HINTS = dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), RIGHTS)
HINTS |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), FULL)
COLUMNS = "condition against n_choices n_differ margin_differ logits_equal logit_drift same_output"
# What several commands take.
Gguf = Annotated[str, Argument(help="A name of `dfqs-nb models`, or a file.")]
Context = Annotated[int, Option(help="Tokens of context.")]
Threads = Annotated[int, Option(help="0: chosen for the model.")]
Fresh = Annotated[bool, Option("--fresh", help="Ignore the results of an earlier run.")]
KeyVariable = Annotated[str, Option(metavar="NAME", help="Environment variable with the server's key.")]


@app.callback()
def _top(version: bool = Option(False, "--version", help="Print the version.")) -> None:
    pass


@app.command(rich_help_panel=WHOLE)
def run(
    notebooks: list[str] = Argument(None, help="Notebooks to run, as 01 or 01_merge_shards. Default: all."),
    model: str = Option("", help="A name of `dfqs-nb models`, a file, or hf://owner/repo/file."),
    run: str = Option("", help="The folder under outputs/. Default: nano, or the model's name."),
    fresh: Fresh = False,
    tier: str = Option("", help="nano or standard. Default: nano for the reference model, else standard."),
    budget_minutes: float | None = Option(None, help="Long measurements are cut to it. Default: 60."),
    parameter: list[str] = Option([], "-p", "--parameter", metavar="NAME=VALUE", help="For the notebooks."),
) -> None:
    """Run the notebooks in order into outputs/RUN/.

    Examples: `dfqs-nb run`, `dfqs-nb run 01 02 --model model.gguf`, `dfqs-nb run -p n_ctx=4096`
    """
    from dfqs_nb.workbook import run as workbook

    paths = workbook.find_notebooks(notebooks or [])
    if odd := [assignment for assignment in parameter if "=" not in assignment]:
        hint = "write -p n_ctx=4096, or `make run PARAMS=n_ctx=4096`"
        raise DfqsError(f"{odd[0]!r} is not of the form name=value", hint=hint)
    texts = {name.strip(): text for name, _, text in (given.partition("=") for given in parameter)}
    options = {"model": model, "run_name": run, "tier": tier, "budget_minutes": budget_minutes}
    own = {name: str(value) for name, value in options.items() if value not in ("", None)}
    if twice := sorted({*texts} & {*own}):
        raise DfqsError(f"{twice[0]} is given twice, as an option and with -p", hint="give one of the two")
    values = workbook.parse_parameters({**texts, **own}, workbook.parameter_types(paths))
    name = values.pop("run_name", "") or workbook.default_run_name(values.get("model"))
    numbers, model = sorted({path.stem[:2] for path in paths}), values.get("model", "")
    if "01" in numbers and model:
        workbook.check_model(model, Path(values.get("output_dir") or outputs_dir() / name))
    is_begun = "01" in numbers or (outputs_dir() / name / "merge.json").exists()
    if not is_begun and {*numbers} - {"00", "08"}:  # which read nothing that notebook 01 wrote
        words = ["dfqs-nb", "run", "01", *numbers, "--run", name]
        words += ["--model", model or "MODEL"] if model or name != "nano" else []
        begin = f"to begin it: `{' '.join(map(quoted, words))}`"
        raise DfqsError("notebook 01 did not run here", where=tilde(run_folder(name, begin)), hint=begin)
    result = workbook.run_workbook(name, values, paths, fresh, sys.stderr, say)
    say(f"\n{workbook.summary_text(result)}")
    raise typer.Exit(int(any(notebook.failed for notebook in result.notebooks)))


@app.command(rich_help_panel=WHOLE)
def models() -> None:
    """List the models known by name."""
    from dfqs_nb.gguf import models as registry

    for model in registry.registered().values():
        size = f"{counted(len(model.files), 'files')}, {round(model.size_bytes / 1e9, 3):,} GB"
        say(f"{model.name}\n    {model.title}\n    {size}, {model.licence}, {model.source}\n    {model.note}")


@app.command(rich_help_panel=WHOLE)
def sweep(
    table: Path = Argument(..., metavar="MODELS.CSV", help="Columns: model, run, any notebook parameter."),
    scheduler: str = Option("", metavar="tcp://HOST:8786", help="A Dask cluster that sees these files."),
    name: str = Option("", help="The folder under outputs/. Default: sweep- and the table's name."),
    notebook: list[str] = Option([], metavar="NN", help="Only these notebooks. Default: all."),
    fresh: Fresh = False,
) -> None:
    """Run the workbook for each row of a table, and rank the reports.

    If a sweep is killed, the same command resumes it. Example: `dfqs-nb sweep data/sweep_example.csv`
    """
    from dfqs_nb.workbook import sweep as sweeps
    from dfqs_nb.workbook.run import find_notebooks

    paths = find_notebooks(notebook)
    rows = sweeps.sweep(table, scheduler=scheduler, name=name, notebooks=paths, fresh=fresh, tell=say)
    say_table(rows[["line", "run", "status", "seconds"]], ".1f")  # each reason was said with its row
    n_done = int((rows["status"] == "done").sum())
    say(f"{n_done} of {len(rows)} rows done")
    raise typer.Exit(int(n_done < len(rows)))


def open_model(model: str, n_ctx: int, threads: int = 0) -> Any:
    """Open a model with settings that suit it and this machine."""
    from dfqs_nb import gguf, llama

    shards = gguf.shards.open_shards(gguf.models.resolve(model)[0])
    return llama.open_model(shards, llama.OpenSettings.of(shards, n_ctx=n_ctx, n_threads=threads))


@contextmanager
def _room_for(output: Path) -> Iterator[Path]:
    """Before the work: make the folder of what the block writes, and try it. Left empty, it goes again."""
    (folder := output.parent).mkdir(parents=True, exist_ok=True)
    try:
        if not os.access(folder, os.W_OK):
            raise OutputError("cannot be written", where=output, hint="take a folder that you may write")
        yield output
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def identity(model: Any) -> str:
    """SHA-256 of an open model: from its manifest, where that is ours and holds, else read anew."""
    from dfqs_nb.merge.merge import earlier_result

    earlier = earlier_result(model.path)
    return earlier.sha256 if earlier else str(model.shards.sha256)


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
    terminal.say_written(experiment.write_tables(folder), folder)
    raise typer.Exit(int(not experiment.passed))


@app.command(rich_help_panel=MEASURE)
def score(
    model: str = Argument(..., help="A name of `dfqs-nb models`, a file, or the URL of a server."),
    endpoint_model: str = Option("", metavar="NAME", help="Which of the server's models."),
    key_variable: KeyVariable = "",
    timeout: float = Option(3600.0, min=1, help="Seconds to wait for an answer of a server."),
    tier: Literal["nano", "standard"] = Option("standard", help="Which question sets."),
    set_names: list[str] = Option([], "--set", metavar="NAME", help="Only these sets, or JSONL files."),
    n_ctx: Context = 4096,
    threads: Threads = 0,
    limit: int = Option(0, min=0, help="Questions a set, evenly from its families. 0: all."),
    budget_minutes: float = Option(0.0, min=0, help="No question is asked after that. 0: no limit."),
    run: str = Option("", help="The folder under outputs/. Default: from the model."),
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
            score_set: Any = serve.checks.score_set
        else:
            opened = stack.enter_context(open_model(model, n_ctx, threads))
            model_id, folder = identity(opened), run_dir(run or default_run_name(model))
            score_set = scores.score_set
        place, runs = stack.enter_context(_room_for(folder / "scores")), []
        base, seconds = not getattr(opened, "has_template", True), 60 * budget_minutes or math.inf
        for item_set, timed in options.shares(sets, seconds, is_base=base):
            runs.append(score_set(opened, item_set, place, timed, model_id=model_id))
            say(runs[-1].score.sentence)
            for row in runs[-1].answered.query("not correct").head(1).itertuples():
                right = "" if item_set.kind == "code" else f"; expected {row.expected!r}"
                say(one_line(f"not right, for example {row.id}: {row.reason:.150}{right:.60}"))
        results = [vars(run.score) | {"conditions": run.conditions} for run in runs]
        say(f"wrote {tilde(write_json(place / 'results.json', results))}; the answers are beside it")


@app.command(rich_help_panel=MEASURE)
def record(
    model: Gguf,
    output: Path = Option(..., "-o", "--output", help="The record, a JSONL file."),
    prompts: str = Option("standard-reasoning", metavar="SET", help="A question set, or a JSONL file."),
    tokens: int = Option(64, min=1, help="Tokens of each answer."),
    limit: int = Option(32, min=1, help="The largest number of prompts."),
    n_ctx: Context = 4096,
    threads: Threads = 0,
    overwrite: Overwrite = False,
) -> None:
    """Record an original's predictions, to judge quantizations by them.

    Resumes after a kill. Example: `dfqs-nb record model-F16.gguf -o original.jsonl`
    """
    from dfqs_nb.ladder import fidelity
    from dfqs_nb.scores import ItemSet

    questions = ItemSet.load(prompts).part(limit)
    with _room_for(output), ExitStack() as stack:
        check_output(output, overwrite=overwrite)
        opened = stack.enter_context(open_model(model, n_ctx, threads))
        fidelity.write_record(opened, questions, output, n_tokens=tokens, sha256=identity(opened))
    say(f"wrote {tilde(output)}; now compare: dfqs-nb fidelity MODEL {shlex.quote(str(output))}")


@app.command(rich_help_panel=MEASURE)
def fidelity(
    model: Gguf,
    record: Path = Argument(..., help="The record of the original's predictions, a JSONL file."),
    output: Path | None = Option(None, "-o", "--output", help="Also write a CSV with a row for each token."),
    n_ctx: Context = 4096,
    threads: Threads = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare a quantization with the record of its original.

    Example: `dfqs-nb fidelity model-IQ2_XXS.gguf original.jsonl`
    """
    from dfqs_nb.ladder import fidelity as compared

    loaded = compared.Record.load(record)
    with _room_for(output) if output else nullcontext():
        if output:
            check_output(output, [record], overwrite)
        with open_model(model, n_ctx, threads) as opened:
            result = compared.compare_record(opened, loaded)
        n_prompts = result["id"].nunique()
        say(f"against {loaded.head.source}: {n_prompts} prompts, {len(result):,} tokens; 95 % intervals")
        say_table(compared.summary(result), "z.4f")
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
    key_variable: KeyVariable = "",
    overwrite: Overwrite = False,
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
    given: dict[str, Any] = {"n_ctx": n_ctx, "n_gpu_layers": gpu_layers, "port": port, "overwrite": overwrite}
    folder = output or outputs_dir() / f"deploy-{target}"
    recipe = recipes.write_recipe(target, model, folder, **given, key_variable=key_variable)
    say(*(f"- {note}" for note in recipe.notes), "", f"cd {shlex.quote(str(folder))}", *recipe.commands)
    say(f"\nwrote {', '.join(tilde(path) for path in recipe.files)}")


def run_folder(name: str, begin: str = "") -> Path:
    """The folder of a run, by its name under outputs/, or its or its report's path.

    A `DfqsError` names the runs that there are, and ``begin``, the command for a new one.
    """
    for folder in (Path(name.removesuffix("/report.json")), outputs_dir() / name):
        if folder.is_dir():
            return folder
    runs = sorted(path.parent.name for path in outputs_dir().glob("*/merge.json"))
    there = ", ".join(runs) or f"none yet{'' if begin else '; `make run` makes one'}"
    hint = "; ".join(filter(None, [f"{did_you_mean(name, runs)}there are: {there}", begin]))
    raise DfqsError(f"no run is called {name!r}", where=tilde(outputs_dir()), hint=hint)


@app.command(rich_help_panel=REPORT)
def report(
    run: str = Argument("nano", help="A run's name under outputs/, its folder, or its report.json."),
    check: bool = Option(False, "--check", help="Write nothing; check the report and the files behind it."),
) -> None:
    """Write the DFQS report of a run, or check one.

    Examples: `dfqs-nb report nano`, `dfqs-nb report nano --check`
    """
    from dfqs_nb import report as reports
    from dfqs_nb.workbook.run import alone

    folder = run_folder(run)
    try:
        with alone(folder):
            pass
    except DfqsError:
        say("a run is at work in this folder: what it has not finished is missing below, or seems damaged")
    if check:
        say(f"{tilde(folder)}/", *(f"  {line}" for line in reports.check_run(folder)))
        return
    written = reports.write_report(folder, reports.build_report(folder))
    say(reports.verdict(reports.read_report(folder)))
    terminal.say_written(written, folder)


@app.command(rich_help_panel=REPORT)
def compare(
    runs: list[str] = Argument(..., metavar="RUN...", help="Runs or report.json files; baseline first."),
) -> None:
    """Compare reports made under equal conditions, item by item.

    Example: `dfqs-nb compare nano nano2`
    """
    from dfqs_nb import report

    places = [name if Path(name).is_file() else str(run_folder(name)) for name in runs]
    comparison = report.compare_reports(places)
    say(comparison)
    name = "-".join(["compare", *(run.report["run"] for run in comparison.runs)])
    folder = run_dir(name if len(name) < 100 else f"{name[:88]}-{canonical_sha256(name)[:8]}")
    terminal.say_written([write_text(folder / "comparison.md", str(comparison))], folder)


@app.command(rich_help_panel=REPORT)
def leaderboard(folder: Path | None = Argument(None, help="Default: outputs/.")) -> None:
    """Rank the reports of a folder, within equal conditions.

    Exit status 1: a report cannot be used. Example: `dfqs-nb leaderboard`
    """
    from dfqs_nb import report

    ranked = report.leaderboard(folder or outputs_dir())
    say(ranked)
    terminal.say_written(ranked.write(), ranked.folder)
    raise typer.Exit(int((ranked.table["problem"] != "").any()))


def program(typed: str = "") -> Any:
    """The program with every command in it, or with just the one that was typed, which starts sooner."""
    from dfqs_nb.workbook import file_commands  # noqa: F401 (it registers its commands)

    part = copy(app)
    named = [it for it in app.registered_commands if it.callback and it.callback.__name__ == typed]
    part.registered_commands = named or sorted(
        app.registered_commands, key=lambda it: terminal.PANELS.index(it.rich_help_panel)
    )
    return typer.main.get_command(part)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    1: an error, as one line on standard error; 2: the command line is wrong; 130: interrupted. An unexpected
    error is one line too, and its traceback goes to a log.
    """
    gc.set_threshold(100_000)  # a command is short: its garbage is collected rarely,
    atexit.register(gc.disable)  # and not when it ends
    warnings.formatwarning = lambda message, *place, **more: f"dfqs-nb: {plain(message)}\n"
    words = argv if argv is not None else sys.argv[1:]
    try:
        Path.cwd()
    except FileNotFoundError:
        return _fail("the current folder was deleted: go to another one (`cd`)")
    if "--version" in words[:1]:
        say(f"dfqs-nb {__version__}")
        return 0
    try:
        status = program(*words[:1])(words, prog_name="dfqs-nb", standalone_mode=False)
        if status == INTERRUPTED:  # a newer typer makes this status of an interrupt
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except USAGE as error:
        error.show()
        return 2
    except DfqsError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; what was written stays, and the same command resumes it", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = isinstance(error, OSError) and HINTS.get(error.errno or 0, "")
        if isinstance(error, OSError) and (place := error.filename2 or error.filename or hint and "the disk"):
            place = re.sub(r"(?<=/)\.([^/]+)\.(\w{16}\.tmp|answers|journal)$", r"\1", str(place))  # as named
            return _fail(f"{tilde(place)}: cannot be read or written ({error.strerror}){hint}")
        what = f"unexpected {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        log = Path(tempfile.gettempdir(), LOG)
        with suppress(OSError), log.open("a", encoding="utf-8", errors="replace") as file:  # a full disk
            file.write(traceback.format_exc())
            what += f"; its place in the code is in {log}"
        return _fail(what)


def _fail(message: str, status: int = 1) -> int:
    print(f"dfqs-nb: {terminal.as_typed(message)}", file=sys.stderr)
    return status
