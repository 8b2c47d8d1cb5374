"""What llama.cpp's tools and gguf-py answer, recorded in tests/data so that every test run can compare.

``python tests/support/record_references.py`` writes the records again; the slow tests derive them again and
compare (tests/integration/test_reference_tools.py). They change with llama-cpp-python's version and with the
reference model, never by hand.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp_tools
from gguf import GGUFReader

DATA = Path(__file__).resolve().parents[1] / "data"
MODELS = Path(__file__).resolve().parents[2] / "data" / "reference"
QUANTIZATIONS = ("IQ1_S-XL", "Q8_0")
SPLITS = {2: 63, 3: 42, 7: 18}  # shards -> --split-max-tensors, of 126 tensors


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped(quantization: str) -> Path:
    return MODELS / f"DFQS-Nano-{quantization}-00001-of-00002.gguf"


def merge_record(quantization: str, folder: Path) -> dict[str, Any]:
    """Hashes of what llama-gguf-split makes of the shipped pair: merged, split again, merged again."""
    tool = str(llama_cpp_tools.tool("llama-gguf-split"))

    def run(*arguments: object) -> None:
        subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True)

    merged = folder / f"{quantization}.gguf"
    run("--merge", shipped(quantization), merged)
    record: dict[str, Any] = {
        "tensors": len(GGUFReader(merged).tensors),
        "bytes": merged.stat().st_size,
        "merged": sha256(merged),
        "splits": {},
    }
    for count, most in SPLITS.items():
        prefix = folder / f"{quantization}-{count}"
        run("--split", "--split-max-tensors", most, merged, prefix)
        shards = sorted(folder.glob(f"{prefix.name}-*-of-*.gguf"))
        again = folder / f"{prefix.name}-merged.gguf"
        run("--merge", shards[0], again)
        record["splits"][str(count)] = {
            "split_max_tensors": most,
            "shards": [sha256(s) for s in shards],
            "merged": sha256(again),
        }
    return record


def peer_fields(reader: GGUFReader) -> Iterator[tuple[str, str, bool, Any]]:
    """Name, type, whether an array, and value of each field as gguf-py reads it, in the file's order."""
    for name, found in reader.fields.items():
        if not name.startswith("GGUF."):
            kinds = [kind.name for kind in found.types]
            is_array = kinds[0] == "ARRAY"
            # gguf-py says nothing about the items of an empty array
            yield (
                name,
                kinds[-1] if kinds[-1] != "ARRAY" else "",
                is_array,
                (found.contents() if found.data else []),
            )


def digest(kind: str, is_array: bool, value: Any) -> str:
    """A short hash of a field's type and value, the same for every reader that reads it right."""
    return hashlib.sha256(json.dumps([kind, is_array, value]).encode()).hexdigest()[:16]


def vocabulary_record(path: Path) -> dict[str, str]:
    """The digest of every field of a GGUF vocabulary file, as gguf-py reads it."""
    return {name: digest(*rest) for name, *rest in peer_fields(GGUFReader(path))}


def read(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text())


def write(name: str, record: dict[str, Any]) -> None:
    (DATA / name).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    version = llama_cpp_tools.locked()[0]
    with tempfile.TemporaryDirectory() as folder:
        write(
            "merge_hashes.json",
            {
                "made_by": "llama-gguf-split, from the llama.cpp vendored by llama-cpp-python's source",
                "llama_cpp_python": version,
                "how": "--merge of the shipped pair; --split --split-max-tensors N of that; --merge of those",
                "models": {name: merge_record(name, Path(folder)) for name in QUANTIZATIONS},
            },
        )
    write(
        "vocabulary_digests.json",
        {
            "made_by": "gguf.GGUFReader 0.19.0, digest() of each field",
            "llama_cpp_python": version,
            "files": {path.name: vocabulary_record(path) for path in llama_cpp_tools.vocabularies()},
        },
    )


if __name__ == "__main__":
    sys.exit(main())
