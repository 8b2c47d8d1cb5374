"""What several tests share."""

from pathlib import Path

import pytest

from dfqs_nb.core.paths import data_dir
from dfqs_nb.merge import merge_model

REFERENCE = data_dir() / "reference"
# Scripts for other interpreters, or to be run by hand: pytest would import them for their doctests.
collect_ignore = [
    "support/transformers_peer.py",
    "support/record_remote.py",
    "support/greedy_remote.py",
    "benchmarks",
]


@pytest.fixture(scope="session")
def merged_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model at IQ1_S-XL as one file. Not to be written to."""
    output = tmp_path_factory.mktemp("merged") / "DFQS-Nano-IQ1_S-XL.gguf"
    shard = REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
    return merge_model(shard, output, progress=False).path
