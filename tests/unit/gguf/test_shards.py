"""Finding and checking shards: every way a set can be wrong has its own error, and nothing is lost."""

import shutil
from pathlib import Path

import pytest
from gguf_fixtures import split_like_llama

from dfqs_nb.core.errors import DfqsError, HeaderError, LayoutError, ShardError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.broken import glue
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import find_shards, open_shards, shard_path
from dfqs_nb.merge import diagnose

REFERENCE = data_dir() / "reference"
IQ1 = [shard_path(REFERENCE / "DFQS-Nano-IQ1_S-XL", n, 2) for n in (1, 2)]
Q8 = [shard_path(REFERENCE / "DFQS-Nano-Q8_0", n, 2) for n in (1, 2)]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(path, tmp_path)) for path in IQ1]


def patch_field(path: Path, name: str, value: bytes) -> None:
    """Overwrite a field's value in place."""
    start = read_header(path).fields[name].value_start
    with path.open("r+b") as file:
        file.seek(start)
        file.write(value)


@pytest.mark.parametrize("one", IQ1, ids=["from shard 1", "from shard 2"])
def test_any_shard_finds_all(one):
    assert find_shards(read_header(one)) == tuple(IQ1)
    assert open_shards(one).paths == tuple(IQ1)


@pytest.mark.parametrize("n_shards", [3, 7])
def test_sets_of_other_sizes(tmp_path, merged_reference, n_shards):
    paths = split_like_llama(merged_reference, -(-126 // n_shards), tmp_path / "nano")
    shard_set = open_shards(paths[n_shards // 2])
    assert shard_set.paths == tuple(paths) and len(shard_set.tensors) == 126
    assert open_shards(list(reversed(paths))).paths == tuple(paths), "paths may come in any order"


def test_a_single_file_is_a_set_of_one(merged_reference):
    assert find_shards(read_header(merged_reference)) == (merged_reference,)
    assert len(open_shards(merged_reference).tensors) == 126


def refused(paths, *words: str, error: type[DfqsError] = ShardError, **options) -> None:
    """The set is refused with all these words, and no file is touched."""
    files = [Path(p) for p in ([paths] if isinstance(paths, Path) else paths)]
    before = [path.read_bytes() if path.exists() else None for path in files]
    with pytest.raises(error) as caught:
        open_shards(paths, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert caught.value.hint, "an error says what to do next"
    assert [path.read_bytes() if path.exists() else None for path in files] == before


def test_missing_shard(pair):
    pair[1].unlink()
    refused(pair[0], "1 of 2 shards missing", pair[1].name, "download")


def test_missing_from_a_list(pair):
    refused([pair[1]], "shard 1 of 2 is missing")


def test_a_number_above_the_count(pair, tmp_path):
    extra = Path(shutil.copy(pair[1], tmp_path / pair[1].name.replace("00002-of", "00005-of")))
    patch_field(extra, "split.no", b"\4\0")
    with pytest.raises(ShardError, match="claims to be shard 5 of 2"):
        find_shards(read_header(extra))


def test_renamed_shard_given_itself(pair):
    odd = pair[0].rename(pair[0].with_name("model (1).gguf"))
    refused(odd, "shard 1 of 2 by its header", "model (1)-00001-of-00002.gguf")


def test_renamed_shards_can_be_named_explicitly(pair):
    renamed = [path.rename(path.with_name(f"{letter}.gguf")) for path, letter in zip(pair, "ba", strict=True)]
    assert open_shards(renamed).paths == tuple(renamed)


def test_swapped_shards(pair, tmp_path):
    spare = pair[0].rename(tmp_path / "x")
    pair[1].rename(pair[0])
    spare.rename(pair[1])
    refused(pair[0], "shard 2 of 2 by its header")
    assert open_shards(pair).paths == (pair[1], pair[0]), "named explicitly, they go by their headers"


def test_duplicate_shard(pair, tmp_path):
    copy = Path(shutil.copy(pair[0], tmp_path / "copy.gguf"))
    refused([*pair, copy], "copy.gguf: shard 1 of 2 is there twice", f"the other is {pair[0].name}", "once")
    refused([pair[0], pair[0]], "shard 1 of 2 is there twice; name each")


def test_two_whole_models_are_no_set(pair, merged_reference):
    whole = Path(shutil.copy(merged_reference, pair[0].with_name("whole.gguf")))
    refused([merged_reference, whole], "whole.gguf: a whole model, no shard", merged_reference.name)


def test_two_models_by_name():
    refused([IQ1[0], Q8[1]], "different models", "DFQS-Nano-IQ1_S-XL", "DFQS-Nano-Q8_0")


def test_two_models_by_tensor_count(pair):
    patch_field(pair[1], "split.tensors.count", (1328).to_bytes(4, "little"))
    refused(pair[0], "1,328 tensors", "126")


def test_two_models_by_tensor_names(pair, tmp_path):
    other = shard_path(tmp_path / "DFQS-Nano-IQ1_S-XL", 2, 2)
    shutil.copy(IQ1[0], other)
    patch_field(other, "split.no", (1).to_bytes(2, "little"))
    refused(pair[0], "is in 2 shards")


def test_set_of_another_count(pair):
    patch_field(pair[1], "split.count", (3).to_bytes(2, "little"))
    refused(pair[0], "belongs to a set of 3, not of 2")


@pytest.mark.parametrize("cut", [1, 1024, 1_000_000])
def test_truncated_shard(pair, cut):
    """The last tensor may lack its padding (it is not data); one byte less is an error."""
    from dfqs_nb.gguf.header import read_header

    header = read_header(pair[1])
    end = header.data_offset + max(t.offset + t.nbytes for t in header.tensors)
    with pair[1].open("r+b") as file:
        file.truncate(end - cut)
    refused(pair[0], pair[1].name, "bytes short", "download it again", error=LayoutError)


def test_trailing_bytes(pair):
    with pair[0].open("ab") as file:
        file.write(IQ1[1].read_bytes())
    refused(pair[0], "1,903,360 bytes more than its header accounts for", "glued")


@pytest.mark.parametrize("size", [30, 1000, 2500])
def test_truncated_inside_the_header(pair, size):
    with pair[1].open("r+b") as file:
        file.truncate(size)
    refused(pair[0], pair[1].name, "the download was cut off", error=HeaderError)


def test_nothing_named():
    refused([], "no shard was named")


@pytest.mark.parametrize("change", ["gone", "another"])
def test_an_opened_set_is_not_taken_for_what_lies_there_now(pair, change):
    opened = open_shards(pair[0])
    assert open_shards(opened) is opened
    pair[1].unlink()
    if change == "another":
        pair[1].write_bytes(b"GGUF")
    with pytest.raises(ShardError, match="gone, or has changed"):
        open_shards(opened)


def test_shards_glued_into_one_file_are_opened_once_more_like_any(tmp_path):
    glued = diagnose(glue(tmp_path)).shards()
    assert open_shards(glued) is glued and glued.nbytes == glued.paths[0].stat().st_size
