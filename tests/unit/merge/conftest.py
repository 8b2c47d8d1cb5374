"""Tests of the merge stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfqs_nb.core.errors import HeaderError
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import check


@pytest.fixture(scope="session", autouse=True)
def parser_is_asked_once_a_header() -> Iterator[None]:
    """llama.cpp's parser reads a header and the size: of a file that has both of another one, it says the same.

    So a merge that is tried again and again starts one process for it and not hundreds.
    """
    real, known = check.parse, {}

    def parse(path: str | Path) -> check.Parsed:
        path = Path(path)
        try:
            head = path.open("rb").read(read_header(path).data_offset)
        except HeaderError:
            return real(path)
        key = hashlib.sha256(head).hexdigest(), path.stat().st_size
        if key not in known:
            known[key] = real(path)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "parse", parse)
        yield
