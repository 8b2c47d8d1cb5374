"""What people see in notebooks and terminals: tables, sizes, progress, and text from outside, escaped."""

from __future__ import annotations

import difflib
import io
import os
import re
import shlex
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

LARGE_BYTES, BEAT_SECONDS = 1 << 30, 1.0
CODE = re.compile(r"`([\w ./=:,+-]+)`")  # a command or a name in backticks, which no format can misread
TEXT_WIDTH = 96  # characters of a line in an output cell
TOO_LONG = re.compile("(?s)^(.{199})..+")  # for a fact: a name can have 100,000 characters
NONE = "–"  # a cell without a value


class _LastLine(io.StringIO):
    """Hands each line that a bar draws to ``draw``."""

    def __init__(self, draw: Callable[[str], object]) -> None:
        super().__init__()
        self.draw = draw

    def write(self, text: str) -> int:
        if text.startswith("\r"):  # else it moves the cursor
            with suppress(OSError):  # a full disk ends no measurement
                self.draw(text.strip())
        return len(text)


def _in_cell() -> Callable[[str], object]:
    """Draws lines in one place of a cell's output, which an empty line leaves empty."""
    from IPython.display import DisplayHandle

    handle, begun = DisplayHandle(), list[str]()

    def draw(line: str) -> None:
        content = {"text/plain": line} if line else {"text/html": "", "text/plain": ""}
        if begun:
            handle.update(content, raw=True)
        elif line:
            handle.display(content, raw=True)
            begun.append(line)

    return draw


def tqdm(*arguments: Any, **options: Any) -> Any:
    """A progress bar that disappears when it is done; off where ``TQDM_DISABLE`` is set.

    In a notebook it is a line of text: tqdm's widget stays red after an answer that ends early, and is an
    error when the saved notebook is opened again. If ``DFQS_PROGRESS`` names a file, the bar is written
    there, for the program that runs the notebook.
    """
    import tqdm.std

    options = {"leave": False, **options} | ({"disable": True} if os.environ.get("TQDM_DISABLE") else {})
    form, shell = "{desc} {n_fmt}/{total_fmt}{postfix}", sys.modules.get("IPython")
    if place := os.environ.get("DFQS_PROGRESS"):
        file = _LastLine(lambda line: Path(place).write_text(line, encoding="utf-8"))
        options |= {"disable": False, "file": file, "bar_format": form}
    elif shell and hasattr(shell.get_ipython(), "kernel") and not options.get("disable"):
        form = "{desc} |{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        options |= {"file": _LastLine(_in_cell()), "bar_format": form, "ascii": False}
    return tqdm.std.tqdm(*arguments, **options)


class Activity:
    """What this process (with ``own``) and its children do: bytes read from the disk, memory, cores."""

    def __init__(self, *, own: bool = False) -> None:
        self.own, self.seen, self.total = own, dict[int, tuple[int, float, int]](), 0
        self.at = time.monotonic()

    def text(self) -> str:
        """The work since the last call, and all bytes read; of a process that just began, its memory."""
        import psutil

        this, before, reads, seconds, resident = psutil.Process(), self.seen, 0, 0.0, 0
        self.seen = {}
        for process in [this] * self.own + this.children(recursive=True):
            with suppress(psutil.Error):
                read = process.io_counters().read_bytes if hasattr(process, "io_counters") else 0
                used = sum(process.cpu_times()[:2])
                self.seen[process.pid] = read, used, process.ppid()
                then = before.get(process.pid, (read, used))
                reads, seconds = reads + read - then[0], seconds + used - then[1]
                resident += process.memory_info().rss
        for pid in before.keys() - self.seen.keys():
            heir = pid  # when a process ends, the kernel adds what it has read to its parent
            while heir in before and heir not in self.seen:
                heir = before[heir][2]
            reads -= before[pid][0] if heir in self.seen else 0
        reads = max(0, reads)
        now, self.total = time.monotonic(), self.total + reads
        elapsed, self.at = max(now - self.at, 1e-3), now
        facts = [f"{size(self.total)} read from the disk, {size(reads / elapsed)}/s"] if self.total else []
        facts += [f"{size(resident)} in memory"]
        facts += [f"{seconds / elapsed:.1f} cores"] if self.seen.keys() & before.keys() else []
        return ", ".join(facts)


@contextmanager
def heartbeat(what: str, n_bytes: int) -> Iterator[None]:
    """A bar for the bytes that this process and its children read while a file of over 1 GiB is loaded."""
    if n_bytes < LARGE_BYTES:
        yield
        return
    done, activity = threading.Event(), Activity(own=True)
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc=what) as bar:

        def watch() -> None:
            while not done.wait(BEAT_SECONDS):
                bar.set_postfix_str(activity.text(), refresh=False)
                bar.n = min(activity.total, n_bytes)
                bar.refresh()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def size(n_bytes: float) -> str:
    """A number of bytes as people read it, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 999.5:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def per_cent(share: float, digits: int = 1) -> str:
    """A share as people read it.

    >>> per_cent(0.0891), per_cent(0.95, 0)
    ('8.9 %', '95 %')
    """
    return f"{100 * share:.{digits}f} %"


def counted(n: int, name: str) -> str:
    """A number and its noun, singular for 1: of ``files as such`` the first plural, of ``processes``."""
    if n == 1:
        name = re.sub(r"(?<=ss)es\b|(?<=[a-z])s\b", "", name, count=1)
    return f"{n:,} {name}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds == inf:
        return "no limit"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


def cell(value: Any, precision: int | None = None) -> str:
    """A value as people read it: counts with thousands, floats to four digits or to so many decimals."""
    if value is None or value != value:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        decimals = 2 if precision is None else precision
        return f"{value:.4g}" if precision is None and abs(value) < 100 else f"{value:,.{decimals}f}"
    return f"{value:,}" if isinstance(value, Integral) else str(value)


def plain(text: object) -> str:
    """Text from a file, a model or a server, without the control characters that steer a terminal."""
    steering = ("Cc", "Cf", "Cs")
    return "".join(
        "\ufffd" if unicodedata.category(character) in steering and character not in "\n\t" else character
        for character in str(text)
    )


def quoted(path: str | Path) -> str:
    """A path as a word of a shell command that can be pasted."""
    return plain(shlex.quote(str(path)))


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``did you mean ...? `` for a name close to a known one, else an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}? " if close else ""


def one_line(text: object) -> str:
    """Text from outside on one line."""
    return " ".join(plain(text).split())


def markdown(text: object) -> str:
    """Text from outside as Markdown that shows it literally, but for commands in backticks."""
    line = one_line(text)
    if "`" in CODE.sub("", line):  # a backtick without its partner would swallow what follows
        return _escaped(line)
    return "".join(f"`{it}`" if at % 2 else _escaped(it, at) for at, it in enumerate(CODE.split(line)))


def _escaped(text: str, at: int = 0) -> str:
    """A part of a line as Markdown that shows it literally; 0 is the first part, which can begin a block."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")  # `>` begins quotes only
    # `~` needs a neighbour to strike through, `_` within a word is no emphasis, `]` ends a link before these
    escaped = re.sub(r"[\\|`*]|~(?=\S)|(?<=\S)~", r"\\\g<0>", escaped)
    escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])", r"\\\g<0>", escaped)
    if not at:
        escaped = re.sub(r"^>", r"\>", escaped)
        escaped = re.sub(r"^(\d*)([#=+-]|(?<=\d)[.)])(?=\s|$|[#=+-])", r"\1\\\2", escaped)
    # GitHub and the hub make links of bare addresses, too
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def markdown_table(table: pd.DataFrame) -> str:
    """A frame as a Markdown table with escaped cells; numbers are aligned to the right."""
    numeric = [table[column].dtype.kind in "iuf" for column in table.columns]
    rows = [list(map(str, table.columns)), *(list(row) for row in table.to_numpy(object))]
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("---:" if n else "---" for n in numeric) + "|", *lines[1:]])


def entries(text: str) -> dict[str, str]:
    """A table that is written as ``name: value | name: value``."""
    return dict(entry.strip().split(": ", 1) for entry in text.split("|"))


# Columns whose names say too little; "low" and "high" are the ends of intervals.
LABELS = entries("""
n_ctx: context (tokens) | length: context (tokens) | longest: longest context (tokens) |
depth: depth (tokens) | nbytes: bytes | expected_nbytes: bytes by its header | low: 95 % from |
high: 95 % to | median: median (tokens/s) | min: lowest | max: highest | roof: roof (tokens/s) |
other_cores: cores busy elsewhere | kld: KL divergence (nats) | kld_low: KL from | kld_high: KL to |
kld_tail: 99 % of tokens under | boundary: boundary (tokens) | decode: decode (tokens/s) |
bits_per_weight: bits a weight | expert_bits: bits a weight of experts | bits_a: bits a weight of a |
bits_b: bits a weight of b | logit_drift: logits move by at most | llama_cpp: llama.cpp |
finish_reason: ended by | tokens_per_sec: tokens/s | n_differ: choices that differ |
margin_differ: largest margin of a flip | drift_of_equal_experts: with equal experts by at most |
same_output: same greedy answer
""")


def label(name: object) -> str:
    """A column's name for people, with its unit."""
    text = str(name)
    if text in LABELS or not re.fullmatch(r"[a-z]+(_[a-z][a-z0-9]*)+", text):
        return LABELS.get(text, text)
    text = re.sub("_high$", " to", re.sub("_low$", " from", text.removeprefix("n_")))
    return text.replace("_", " ")


def say(*lines: object) -> None:
    """Print long lines so that they break between words, not within a name, a command, "n = 32" or "95 %"."""
    for line in lines:
        text, indent = re.sub(" (?=[=%])|(?<==) ", "\xa0", str(line)), "  " * str(line).startswith("- ")
        text = CODE.sub(lambda it: it[0].replace(" ", "\xa0"), text)
        filled = textwrap.fill(
            text, TEXT_WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )
        print(filled.replace("\xa0", " "))


TABLE = """\
<div style="overflow-x: auto">
<table>
{% for row in rows %}{% set head = loop.first -%}
{% if loop.index0 < 2 %}<{{ "thead" if head else "tbody" }}>
{% endif %}<tr>
{% for text in row %}{% set tag = "th" if head or loop.index0 < n_names else "td" -%}
<{{ tag }}{% if loop.index0 in left %} style="text-align: left"{% endif %}>{{ text }}</{{ tag }}>
{% endfor %}</tr>
{% endfor %}</table>
</div>"""


@dataclass(repr=False)
class Table:
    """Rows of texts, headings first: in a notebook a table that scrolls, elsewhere lines."""

    rows: Sequence[Sequence[str]]
    n_names: int = 1  # the first columns: they name the rows
    left: Collection[int] = ()  # columns of text: JupyterLab aligns all to the right, and drops style sheets

    def __repr__(self) -> str:
        return "\n".join(" | ".join(map(one_line, row)) for row in self.rows)

    def _repr_html_(self) -> str:
        from jinja2 import Template

        rows = [map(plain, row) for row in self.rows]
        return str(Template(TABLE, autoescape=True).render(vars(self) | {"rows": rows}))


def facts(values: Mapping[str, Any], name: str = "value") -> Table:
    """Facts as a table, with names by `label` and values by `cell`; long texts are cut."""
    rows = [(label(key), re.sub(TOO_LONG, r"\1…", plain(cell(it)))) for key, it in values.items()]
    return Table([("", name), *rows])


def shown(table: pd.DataFrame, *, precision: int = 2, percent: Collection[str] = ()) -> Table:
    """A frame as a table, with names by `label`. ``precision``: of floats; ``percent``: columns of shares."""
    n, whole = table.index.nlevels, table.reset_index(allow_duplicates=True)
    columns, left = list[list[str]](), list[int]()
    for at, (name, column) in enumerate(whole.items()):
        digits = 1 if at < n else precision
        form: Callable[[Any], str] = per_cent if name in percent else partial(cell, precision=digits)
        known = column.notna()
        columns.append([form(it) if there else NONE for it, there in zip(column, known, strict=True)])
        left += [at] if at < n or column.dtype.kind not in "iuf" else []
    headings = ["" if name is None else label(name) for name in (*table.index.names, *table.columns)]
    return Table([headings, *zip(*columns, strict=True)], n, left)
