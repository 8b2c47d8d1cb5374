"""What several tests share."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfqs_nb.core.errors import HeaderError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import check
from dfqs_nb.merge import merge_model

REFERENCE = data_dir() / "reference"
# Scripts for other interpreters, or to be run by hand: pytest would import them for their doctests.
collect_ignore = [
    "support/transformers_peer.py",
    "support/record_remote.py",
    "benchmarks",
]


@pytest.fixture(scope="session")
def merged_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model at IQ1_S-XL as one file. Not to be written to."""
    output = tmp_path_factory.mktemp("merged") / "DFQS-Nano-IQ1_S-XL.gguf"
    shard = REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
    return merge_model(shard, output).path


@pytest.fixture(scope="session", autouse=True)
def _answers_are_kept_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What llama.cpp answers about the files of tests is kept for the session, and not in ``outputs/``."""
    folder = tmp_path_factory.mktemp("kept")
    real = check.outputs_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "outputs_dir", lambda: real() if "DFQS_OUTPUTS" in os.environ else folder)
        yield


_PARSED: dict[tuple[str, int], check.Verdict] = {}


@pytest.fixture(scope="module")
def parser_is_asked_once_a_header() -> Iterator[None]:
    """llama.cpp's parser reads a header and the size: of another file that has both, it says the same.

    So a merge that is tried again and again starts one process for it and not hundreds.
    """
    real = check.parse

    def parse(path: str | Path) -> check.Verdict:
        try:
            head = Path(path).read_bytes()[: read_header(path).data_offset]
        except HeaderError:
            return real(path)
        key = hashlib.sha256(head).hexdigest(), Path(path).stat().st_size
        if key not in _PARSED:
            _PARSED[key] = real(path)
        return _PARSED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "parse", parse)
        yield
