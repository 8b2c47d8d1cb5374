"""An append-only record of finished items, so that a killed run continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfqs_nb.core.files import stood_on


def conditions_hash(conditions: Mapping[str, Any]) -> str:
    """A short hash of conditions: equal values in any order give the same one.

    >>> conditions_hash({"a": 1, "b": 2}) == conditions_hash({"b": 2, "a": 1})
    True
    """
    text = json.dumps(conditions, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """Rows of one JSONL file that were made under the same conditions, by their id.

    Each row is one line, flushed to the disk before ``add`` returns. A last line without its end, left by a
    kill, is cut off. Rows of other conditions stay in the file and are passed over.
    """

    def __init__(self, path: str | Path, conditions: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path, self.key = Path(path), conditions_hash(conditions)
        if fresh:
            self.path.unlink(missing_ok=True)
        self._rows: dict[str, dict[str, Any]] = {}
        for row in _read(self.path):
            if row.pop("conditions", None) == self.key:
                self._rows[row.pop("id")] = row
        self.n_found = len(self._rows)
        stood_on(self.path)

    def __contains__(self, item: str) -> bool:
        return item in self._rows

    def __getitem__(self, item: str) -> dict[str, Any]:
        return self._rows[item]

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were added."""
        return [{"id": item, **row} for item, row in self._rows.items()]

    def add(self, item: str, **row: Any) -> dict[str, Any]:
        """Append a row and return it."""
        line = json.dumps({"conditions": self.key, "id": item, **row}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[item] = json.loads(line)
        del self._rows[item]["conditions"], self._rows[item]["id"]
        return self._rows[item]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line; a torn last one is cut off the file."""
    if not path.exists():
        return
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        with path.open("r+b") as file:
            file.truncate(whole)
    for line in raw[:whole].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the disk lost a line's bytes: its item is measured again
        if isinstance(row, dict) and "id" in row:
            yield row
