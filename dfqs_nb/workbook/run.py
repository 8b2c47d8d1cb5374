"""Run the notebooks in order with papermill, and sum up what they found."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from dfqs_nb import ladder
from dfqs_nb.core.display import counted, did_you_mean, duration, markdown, plain, quoted
from dfqs_nb.core.errors import DfqsError, StageError
from dfqs_nb.core.files import read_json, there_is, write_json, write_text
from dfqs_nb.core.paths import REPOSITORY, data_dir, outputs_dir, run_dir, tilde
from dfqs_nb.core.stage import COMMAND, Stage, read_stage
from dfqs_nb.core.stage import NOTEBOOKS as STAGES
from dfqs_nb.gguf import models as registry
from dfqs_nb.workbook.live import Live, use

if TYPE_CHECKING:
    import pandas as pd

NOTEBOOKS = REPOSITORY / "notebooks"
PATTERN = "[0-9][0-9]_*.ipynb"
KERNEL = "python3"
NANO, STANDARD = "nano", "standard"
BUDGET_MINUTES = 60.0
PLACES = {"output_dir", "texts", "prompt_folder", "matrix_file"}  # parameters that are paths by their name
QUIET = "--log-level=CRITICAL"  # of the kernel: nothing about its own sockets, or its own shutdown


class NotebookRun(NamedTuple):
    """One executed notebook: where it is, how long it took, and why it was left out."""

    path: Path
    seconds: float = 0.0
    left_out: str = ""
    failed: bool = False


class WorkbookRun(NamedTuple):
    """A finished run: its folder, its notebooks in order, each stage's lines, and the report's verdict."""

    folder: Path
    notebooks: list[NotebookRun]
    summary: dict[str, list[str]]
    verdict: str


def find_notebooks(names: Iterable[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The workbook's notebooks in order, or those named: ``1``, ``01``, ``01_merge_shards`` or a path.

    `DfqsError`: a name fits none.
    """
    stems = (re.sub(r"^\d$", r"0\g<0>", Path(name).stem) for name in names)
    paths, wanted = sorted(folder.glob(PATTERN)), tuple(f"{stem}_" for stem in stems)
    for name in wanted:
        if not any(f"{path.stem}_".startswith(name) for path in paths):
            hint = f"there are {', '.join(path.stem for path in paths) or 'none: go to a checkout'}"
            raise DfqsError(f"no notebook is called {name[:-1]!r}", where=tilde(folder), hint=hint)
    return [path for path in paths if not wanted or f"{path.stem}_".startswith(wanted)]


def declared_parameters(path: Path) -> dict[str, dict[str, str]]:
    """The parameters of a notebook's cell tagged ``parameters``, as papermill reads them.

    Each value has the keys ``name``, ``inferred_type_name``, ``default`` and ``help``.
    """
    from papermill import inspect_notebook

    parameters: dict[str, dict[str, str]] = inspect_notebook(str(path))
    return parameters


def check_parameters(parameters: Iterable[str], declared: Iterable[str]) -> None:
    """Refuse a parameter that no notebook declares: papermill would only warn, and run without it."""
    known = sorted(set(declared))
    if unknown := sorted(set(parameters) - set(known)):
        hint = did_you_mean(unknown[0], known).strip() or f"known: {', '.join(known) or 'none'}"
        raise DfqsError(f"no notebook has a parameter {', '.join(map(repr, unknown))}", hint=hint)


def parameter_types(notebooks: Iterable[Path] = ()) -> dict[str, str]:
    """The type of each parameter that the workbook's notebooks, or these, declare, as it is written there."""
    declared = [declared_parameters(path) for path in dict.fromkeys([*find_notebooks(), *notebooks])]
    return {name: facts["inferred_type_name"] for names in declared for name, facts in names.items()}


def parse_parameters(texts: Mapping[str, str], types: Mapping[str, str]) -> dict[str, Any]:
    """Parameters from a command line or a table, as values of the types that the notebooks declare."""
    from pydantic import TypeAdapter, ValidationError

    check_parameters(texts, types)
    kinds: dict[str, tuple[Any, str]] = {"int": (int, "a whole number"), "float": (float, "a number")}
    kinds |= {"bool": (bool, "true or false")}
    values = dict[str, Any]()
    for name, text in texts.items():
        kind, words = kinds.get(types[name], (str, "a text"))
        try:
            values[name] = TypeAdapter(kind).validate_strings(text)
        except ValidationError:
            raise DfqsError(f"the parameter {name} takes {words}, not {text!r}") from None
    return values


def default_run_name(model: str | None) -> str:
    """The run's folder name when none is given: one folder for a model."""
    if not model:
        return "nano"
    stem = model.rstrip("/").rsplit("/", 1)[-1]
    stem = re.sub(r"(-\d{5}-of-\d{5})?(\.gguf([._-]?(part|split)?[._-]?\w{1,9})?)?$", "", stem, flags=re.I)
    return re.sub(r"[^\w.-]+", "-", stem).strip(".-")[:100] or "nano"


def check_model(model: str, folder: Path) -> None:
    """Refuse what is no model before a run begins; ``folder``: the run's, which may have its merge already.

    `DfqsError`: no such name, no address of the hub, or no GGUF file. Nothing is downloaded.
    """
    from dfqs_nb.merge import open_source

    if registry.ADDRESS.match(model):
        registry.parse_address(model)
    elif model not in registry.registered():
        open_source(model, merged_to=folder)


@contextmanager
def alone(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Refuse a second process at work in a run's or a sweep's folder, after waiting some seconds for it."""
    lock = FileLock(folder / ".lock", timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        hint = "wait for it, or choose another name (--run for a run, --name for a sweep)"
        raise DfqsError("another run is at work in this folder", where=tilde(folder), hint=hint) from None
    except OSError:
        pass  # a file system without locks: then nothing is refused
    try:
        yield
    finally:
        lock.release()


def run_workbook(
    run: str = "nano",
    parameters: Mapping[str, Any] | None = None,
    notebooks: Sequence[Path] | None = None,
    fresh: bool = False,
    watch: IO[str] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> WorkbookRun:
    """Execute notebooks (by default all) in order into ``outputs/<run>/``, and write ``summary.md`` there.

    Each notebook gets the parameters that it declares; ``run`` is its ``run_name``. ``tier`` among them is of
    all notebooks, and sets those that are not given. ``budget_minutes`` is of the whole run, divided among
    the notebooks that obey a budget. ``watch`` shows what goes on; ``tell`` gets the plan and what is done.

    `DfqsError`: no notebook declares a parameter, or a cell fails; what earlier notebooks wrote stays.
    """
    paths = list(notebooks) if notebooks is not None else find_notebooks()
    declared = {path: declared_parameters(path) for path in dict.fromkeys([*find_notebooks(), *paths])}
    check_parameters(parameters or {}, chain(*declared.values()))
    given = {name: _absolute(name, value) for name, value in (parameters or {}).items()}
    folder, begin, done = run_dir(run).absolute(), time.monotonic(), list[NotebookRun]()
    command = _command(folder, given)
    if not (minutes := command["budget_minutes"]) >= 1:
        raise DfqsError(f"the budget is {minutes:g} minutes", hint="give a run 1 minute or more")
    tier = command["tier"] or tier_of(given.get("model"), run)
    settings = {name: value for name, value in settings_of(tier).items() if name not in given}
    values = {**settings, "run_name": run, **({"fresh": True} if fresh else {}), **given}
    with alone(folder):
        limit = any("budget_minutes" in declared[path] for path in paths)  # else nothing is cut to it
        most = f", at most about {duration(60 * minutes)}" if limit else ""
        tell(f"run {run}: {tier} tier, {counted(len(paths), 'notebooks')}{most}")
        write_json(folder / COMMAND, command)
        if settings:
            tell("  " + ", ".join(f"{name}={value}" for name, value in settings.items()))
        for number, path in enumerate(paths):
            tell(f"{path.stem} ...")
            # Kernel, imports and figures of the notebooks to come are in no plan: about the shortest so far.
            beside = min((notebook.seconds for notebook in done), default=0.0) * len(paths[number:])
            left = minutes - (time.monotonic() - begin + beside) / 60
            budget = budget_of(path.stem, left, [later.stem for later in paths[number:]])
            values["budget_minutes"] = round(budget, 1)
            chosen, reason = {name: values[name] for name in values if name in declared[path]}, ""
            if "ladder_source" in declared[path] and not chosen.get("ladder_source"):
                chosen["ladder_source"], reason = _ladder_source(folder, command["ladder_source"])
            target = folder / path.name
            live = Live(target, chosen.get("budget_minutes", 0.0), watch)
            own = NotebookRun(target, left_out=reason) if reason else _executed(path, target, chosen, live)
            tell(f"{path.stem}: " + (f"left out: {own.left_out}" if own.left_out else f"{own.seconds:.1f} s"))
            done.append(own)
        return _summed_up(folder, done)


def _command(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """How a run is started; the file `COMMAND` keeps it for its other parts, and for what its report prints.

    What is not given stays as the run had it, if it had the same model.
    """
    command: dict[str, Any] = {"model": "", "tier": "", "ladder_source": "", "options": []}
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = read_json(folder / COMMAND)
        before = {name: type(it)(kept.get(name, it)) for name, it in command.items()}
        command = before if given.get("model", before["model"]) == before["model"] else command
    apart = ("model", "tier", "budget_minutes")
    options = [word for name in given if name not in apart for word in ("-p", f"{name}={given[name]}")]
    command |= {"options": options or command["options"], "budget_minutes": BUDGET_MINUTES}
    return command | {name: given[name] for name in command if name in given}


def _ladder_source(folder: Path, before: str) -> tuple[str, str]:
    """What to climb: what this run climbed before, or else `ladder.source_of`; or why there is nothing."""
    try:
        return before if there_is(before) else ladder.source_of(folder), ""
    except StageError:
        raise
    except DfqsError as error:
        with suppress(StageError):  # none was climbed
            if read_stage(folder, "ladder").get("rungs"):
                return "", f"{error}; the ladder that was climbed before stays"
        Stage(folder, "ladder").finish(conditions={}, summary=[f"not climbed: {error}"])
        return "", str(error)


def _summed_up(folder: Path, done: list[NotebookRun]) -> WorkbookRun:
    """Write the report again, if there is one, as it shows later notebooks, too; then the summary."""
    from dfqs_nb import report

    summary, verdict = read_summary(folder), ""
    if (folder / "report.json").is_file():
        try:
            is_new = any(it.path.name == STAGES["dfqs_report"] for it in done)
            own = report.read_report(folder) if is_new else report.build_report(folder)
            report.write_report(folder, own)
            verdict = str(report.verdict(own))
        except DfqsError as error:
            summary["dfqs_report"] = [f"the report is older than this; a new one cannot be written: {error}"]
    result = WorkbookRun(folder, done, summary, verdict)
    write_text(folder / "summary.md", summary_markdown(result))
    return result


def _absolute(name: str, value: Any) -> Any:
    """Relative paths made absolute: a notebook runs in another folder than the user.

    Of a parameter that is no path by its name (`PLACES`), what exists: its value may be a path, or words of
    which some are. Links stay as they are: in a hub cache a shard's name is the link's, not its target's.
    """
    if not isinstance(value, str) or not value:
        return value
    if name in PLACES:
        return str(Path(value).expanduser().absolute())
    words = [value] if there_is(value) else value.split(" ")
    paths = {word for word in words if there_is(word) and ("/" in word or Path(word).suffix)}
    return " ".join(str(Path(word).absolute()) if word in paths else word for word in words)


def _executed(path: Path, target: Path, parameters: dict[str, Any], live: Live) -> NotebookRun:
    """Execute a notebook; `DfqsError` if it fails. After the report a failure is only noted."""
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    from dfqs_nb.workbook.terminal import as_typed

    begin, so_far = time.perf_counter(), f"its output so far is in {tilde(target)}"
    for name in ("papermill", "asyncio"):  # what goes wrong is said below, once
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # a text that is streamed is one output
    kernel = {"kernel_name": KERNEL, "cwd": path.parent, "extra_arguments": [QUIET], "coalesce_streams": True}
    try:
        with kernel_environment(progress=live.bars), live:
            execute_notebook(path, target, parameters, engine_name=use(live), progress_bar=False, **kernel)
    except KeyboardInterrupt:
        at = f"before {live.name} began"
        at = f"in {live.name}, cell {plain(live.place)}; {so_far}" if live.titles else at
        report = as_typed(f"`dfqs-nb report {quoted(target.parent.name)}` reports what there is")
        print(f"\nstopped {at}", file=sys.stderr)
        print(f"the same command goes on with what is missing; {report}", file=sys.stderr)
        raise
    except (PapermillExecutionError, DeadKernelError) as error:
        what = f"the kernel died in cell {live.place} (killed, out of memory, or aborted by llama.cpp)"
        if isinstance(error, PapermillExecutionError):
            cause = f"{error.ename}: {last_line(error.evalue)}".rstrip(": ")
            what = f"cell In [{error.exec_count}] failed: {cause}"
        failure = DfqsError(what, where=path.name, hint=so_far)
        is_later = path.name in (STAGES["ladder"], STAGES["serving"])
        if not (is_later and target.with_name("report.json").exists()):
            raise failure from error
        return NotebookRun(target, left_out=f"failed: {failure}", failed=True)
    return NotebookRun(target, time.perf_counter() - begin)


def last_line(text: str) -> str:
    """The last line of an error's text that is not blank."""
    return next(filter(None, map(str.strip, reversed(text.splitlines()))), "")


@contextmanager
def kernel_environment(outputs: Path | None = None, progress: Path | None = None) -> Iterator[None]:
    """The environment of a kernel: this interpreter's kernel first, absolute folders, no progress bars.

    ``progress``: a file that gets the state of the bars instead.
    """
    before = dict(os.environ)
    # a user may have a kernel of that name of another interpreter
    places = [f"{sys.prefix}/share/jupyter", before.get("JUPYTER_PATH", "")]
    os.environ |= {"JUPYTER_PATH": os.pathsep.join(filter(None, places)), "TQDM_DISABLE": "1"}
    os.environ |= {"DFQS_OUTPUTS": f"{(outputs or outputs_dir()).absolute()}"}
    os.environ |= {"DFQS_PROGRESS": f"{progress.absolute()}"} if progress else {}
    os.environ |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def read_summary(folder: Path) -> dict[str, list[str]]:
    """The ``summary`` lines of every stage file ``<stage>.json`` in a run's folder, in stage order."""
    there = [name for name in STAGES if (folder / f"{name}.json").exists()]
    return {name: [plain(line) for line in read_stage(folder, name).get("summary", [])] for name in there}


def summary_markdown(result: WorkbookRun) -> str:
    """The verdict, what was found, and how long each notebook took."""
    found = {name: lines for name, lines in result.summary.items() if name != "dfqs_report"}  # the verdict
    parts = {"Verdict": result.verdict.splitlines(), **found}
    parts = {title: [markdown(line) for line in lines] for title, lines in parts.items()}
    parts["Notebooks"] = [
        f"[{path.stem}]({path.name}): {markdown(left_out and f'left out: {left_out}') or f'{seconds:.1f} s'}"
        for path, seconds, left_out, _ in result.notebooks
    ]
    parts |= {"Report": ["[report.html](report.html)"]} if result.verdict else {}
    sections = [f"## {title}\n\n- " + "\n- ".join(lines) for title, lines in parts.items() if lines]
    return "\n\n".join([f"# Run {result.folder.name}", *sections]) + "\n"


def summary_text(result: WorkbookRun) -> str:
    """The same for a terminal: the verdict, or without a report what each stage found."""
    lines = [f"{stage}: {line}" for stage, found in result.summary.items() for line in found]
    place = f"Where it is: {tilde(result.folder)}/{'report.html' if result.verdict else ''}"
    return "\n".join([*([result.verdict] if result.verdict else lines), "", place])


# ---- tiers: the reference model runs with small sets; the values are data (data/tiers.toml) ----


def tier_of(model: str | None, run: str = "") -> str:
    """The tier of a model: ``nano`` for a registered reference model, else ``standard``.

    Without a model: that of the one that notebook 01 of ``run`` prepared, else of the default.
    """
    with suppress(StageError, KeyError):
        model = model or str(read_stage(outputs_dir() / run, "merge")["conditions"]["model"])
    if not model:
        return NANO
    known = registry.registered().get(model)
    is_local = known is not None and not known.source.startswith("hf://")
    reference = (data_dir() / "reference").absolute()
    return NANO if is_local or Path(model).absolute().is_relative_to(reference) else STANDARD


def settings_of(tier: str) -> dict[str, Any]:
    """The parameters that a tier sets; none for ``nano``, whose values are the notebooks' defaults."""
    if tier not in (NANO, STANDARD):
        raise DfqsError(f"there is no tier {tier!r}", hint="use --tier nano or --tier standard")
    return dict(_table().get(tier, {}))


def budget_of(notebook: str, left_minutes: float, to_come: Iterable[str]) -> float:
    """Minutes for one notebook: its share of what is left, among those that still come (itself included)."""
    total = sum(map(share_of, to_come))
    return max(0.5, left_minutes * share_of(notebook) / total) if total else left_minutes


def share_of(notebook: str) -> float:
    """A notebook's share of the budget of a run of all notebooks; 0 for one without a budget."""
    shares: Mapping[str, float] = _table()["budget_shares"]
    return shares.get(notebook, 0) / sum(shares.values())


def _table() -> dict[str, Any]:
    return tomllib.loads((data_dir() / "tiers.toml").read_text(encoding="utf-8"))


# ---- what notebook 00 shows ----


def overview() -> pd.DataFrame:
    """One row a notebook: what it answers, and what it took for models of three sizes, as measured."""
    import pandas as pd

    content = tomllib.loads((data_dir() / "notebooks.toml").read_text(encoding="utf-8"))
    rows = dict[str, dict[str, str]]()
    for name, row in content["notebooks"].items():
        rows[name[:2]] = {"answers": row["answers"]}
        for size, title in content["sizes"].items():
            cost = row.get(size, "not measured")
            rows[name[:2]][title] = cost if isinstance(cost, str) else "{:.2g} min, {:.2g} GB".format(*cost)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")


def parameter_table() -> pd.DataFrame:
    """One row a parameter, from the notebooks: where it counts, its value in both tiers, what it is."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    standard = {"model": "your file", "run_name": "from the file's name", **settings_of(STANDARD)}
    for path in find_notebooks():
        for name, facts in declared_parameters(path).items():
            row = rows.setdefault(name, {"notebooks": "", "reference model": facts["default"].strip('"')})
            row["notebooks"] = f"{row['notebooks']} {path.stem[:2]}".strip()
            row["other models"] = str(standard.get(name, row["reference model"]))
            row.setdefault("what it is", facts["help"])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
