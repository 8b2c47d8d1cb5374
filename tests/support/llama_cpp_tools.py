"""llama.cpp's own tools and files, from the source that llama-cpp-python's distribution vendors.

`source()` fetches that source once (pip, with the lock file's hash) into a cache: ``$DFQS_CACHE``, else
``~/.cache/dfqs-nb``. `tool("llama-gguf-split")` compiles one file against the libraries that
llama-cpp-python installed from the same source, in seconds; a tool that needs more of llama.cpp goes
through llama.cpp's CMake build, in minutes. By hand: ``python tests/support/llama_cpp_tools.py llama-gguf-split``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"

# Tools of one source file that ask for libllama and libggml-base only, with what they compile. Ours is llama-fit.
ONE_FILE: dict[str, list[str | Path]] = {
    "llama-gguf-split": ["tools/gguf-split/gguf-split.cpp"],
    "llama-gguf-hash": [
        "examples/gguf-hash/gguf-hash.cpp",
        "vendor/hash/hash.cpp",
        "vendor/hash/sha1/sha1.c",
        "vendor/hash/sha256/sha256.c",
        "vendor/hash/xxhash/xxhash.c",
    ],
    "llama-bench": [
        "tools/llama-bench/llama-bench.cpp",
        "tools/llama-bench/main.cpp",
        "common/common.cpp",
        "common/log.cpp",
        "common/fit.cpp",
    ],
    "llama-fit": [
        Path(__file__).parent / "llama_fit.cpp",
        "common/log.cpp",
        "common/fit.cpp",
        "common/json.cpp",
    ],
    "test-llama-archs": [
        "tests/test-llama-archs.cpp",
        "common/common.cpp",
        "common/log.cpp",
        "common/fit.cpp",
    ],
}
# What a tool refers to beside these files: llama-bench reads `-fa 0`. All else (downloads, JSON, samplers) is
# not called in what we run; calling it ends the program.
SHIMS = {
    "llama-bench": """
#include <string>
namespace common_arg_utils {
bool is_truthy(const std::string & v) { return v == "on" || v == "1" || v == "true"; }
bool is_falsey(const std::string & v) { return v == "off" || v == "0" || v == "false"; }
bool is_autoy(const std::string & v) { return v == "auto" || v == "-1"; }
}
""",
    "test-llama-archs": "",
}
AS_C = ("sha256.c", "xxhash.c")  # the rest is C++, sha1.c too: llama.cpp puts it in a namespace


class Unavailable(RuntimeError):
    """The source or a compiler cannot be had here; the text says why."""


def cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfqs-nb"
    return Path(os.environ.get("DFQS_CACHE") or default)


def locked() -> tuple[str, str]:
    """The version of llama-cpp-python and the SHA-256 of its source, from the lock file."""
    found = re.search(
        r"^llama-cpp-python==(\S+)[ \\\n]+--hash=sha256:([0-9a-f]{64})$", LOCK.read_text(), re.M
    )
    if not found:
        raise Unavailable(f"{LOCK.name} does not lock llama-cpp-python's source")
    return found[1], found[2]


def source() -> Path:
    """The folder of the vendored llama.cpp; fetched and unpacked on first use.

    Raises:
        Unavailable: no network and nothing in pip's cache, or no pip.
    """
    version, sha256 = locked()
    home = cache() / f"llama_cpp_python-{version}"
    if not home.exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            _unpack(_download(version, sha256, Path(scratch)), Path(scratch) / "unpacked")
            try:
                (Path(scratch) / "unpacked" / home.name).replace(home)
            except OSError:
                if not home.exists():  # else another process was faster
                    raise
    return home / "vendor" / "llama.cpp"


def _download(version: str, sha256: str, folder: Path) -> Path:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={version} --hash=sha256:{sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--require-hashes",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        "-r",
        str(wanted),
    ]
    if find_spec("scikit_build_core"):  # the lock's own; pip would fetch another one, unchecked
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["pip left no archive"])[-1]
        raise Unavailable(f"cannot fetch llama-cpp-python's source: {reason}")
    if hashlib.sha256(archives[0].read_bytes()).hexdigest() != sha256:
        raise Unavailable("llama-cpp-python's source is not the locked one")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)  # the hash was checked


def vocabularies() -> list[Path]:
    """The GGUF vocabulary files that llama.cpp's repository carries for its own tests."""
    return sorted((source() / "models").glob("ggml-vocab-*.gguf"))


def tool(name: str) -> Path:
    """Build the tool ``name`` unless it is there, and return its path.

    Raises:
        Unavailable: no source, no compiler, or the build fails; with the build's last words.
    """
    if name not in ONE_FILE:
        return _cmake(name, cache() / f"build-{locked()[0]}")
    libraries = _libraries()
    folder = cache() / f"tools-{locked()[0]}-{hashlib.sha256(str(libraries).encode()).hexdigest()[:8]}"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(name, libraries, Path(scratch)).replace(folder / name)
    return folder / name


def _libraries() -> Path:
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("llama-cpp-python is not installed")
    return Path(spec.submodule_search_locations[0]) / "lib"


def _compile(name: str, libraries: Path, scratch: Path) -> Path:
    """One compiler call, linked with the libraries that llama-cpp-python runs on."""
    compiler = os.environ.get("CXX") or _program("c++") or _program("g++") or _program("clang++")
    if not compiler:
        raise Unavailable("no C++ compiler: install g++ or clang++")
    root = source()
    info = scratch / "build-info.cpp"  # what llama.cpp's CMake would fill in
    template = (root / "common" / "build-info.cpp.in").read_text()
    info.write_text(re.sub(r"@LLAMA_BUILD_NUMBER@", "0", template).replace("@LLAMA_BUILD_COMMIT@", "sdist"))
    includes = [
        f"-I{root / folder}" for folder in ("include", "common", "ggml/include", "vendor", "vendor/hash")
    ]
    shim = scratch / "shim.cpp"
    shim.write_text(SHIMS.get(name, ""))
    objects = []
    for file in [root / file for file in ONE_FILE[name]] + [info, shim]:
        language = ["-x", "c"] if file.name in AS_C else ["-x", "c++", "-std=c++17"]
        objects.append(str(scratch / f"{file.name}.o"))
        _run([compiler, *language, "-O2", "-w", *includes, "-c", str(file), "-o", objects[-1]])
    link = [
        compiler,
        *objects,
        f"-L{libraries}",
        "-lllama",
        "-lggml",
        "-lggml-base",
        "-pthread",
        f"-Wl,-rpath,{libraries}",
        *([f"-Wl,-rpath-link,{libraries}"] if sys.platform == "linux" else []),
        "-o",
        str(scratch / name),
    ]
    if name in SHIMS:
        link.append(_missing_symbols(compiler, link, scratch))
    _run(link)
    return scratch / name


def _missing_symbols(compiler: str, link: list[str], scratch: Path) -> str:
    """An object that defines every symbol the linker misses as a function that ends the program."""
    said = subprocess.run([*link, "-Wl,--no-demangle"], capture_output=True, text=True, check=False).stderr
    missing = sorted(set(re.findall(r"undefined reference to [`']([^']+)'", said)))
    lines = [
        f'void f{i}(void) __asm__("{symbol}"); void f{i}(void) {{ abort(); }}'
        for i, symbol in enumerate(missing)
    ]
    (scratch / "missing.c").write_text("\n".join(["#include <stdlib.h>", *lines]) + "\n")
    _run([compiler, "-x", "c", "-w", "-c", str(scratch / "missing.c"), "-o", str(scratch / "missing.o")])
    return str(scratch / "missing.o")


def rpc_backend() -> Path:
    """llama.cpp's RPC backend as a library that ``ggml_backend_load`` takes; seconds to compile."""
    compiler = _program("c++") or _program("g++") or _program("clang++")
    if not compiler or sys.platform != "linux":
        raise Unavailable("no C++ compiler, or no Linux")
    root, libraries = source() / "ggml", _libraries()
    library = tool("llama-fit").parent / "ggml-rpc.so"
    if not library.exists():
        scratch = library.with_suffix(".part")
        macros = [f"-DGGML_{name}" for name in ("BACKEND_DL", "BACKEND_SHARED", "BACKEND_BUILD", "SHARED")]
        files = [str(root / "src" / "ggml-rpc" / name) for name in ("ggml-rpc.cpp", "transport.cpp")]
        link = [f"-L{libraries}", "-lggml-base", "-pthread", f"-Wl,-rpath,{libraries}"]
        includes = [f"-I{root / folder}" for folder in ("include", "src")]
        shared = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
        _run([compiler, *shared, *macros, *includes, *files, *link, "-o", str(scratch)])
        scratch.replace(library)
    return library


def with_rpc() -> tuple[Path, Path]:
    """llama.cpp's libraries built with its RPC backend (a folder), and its RPC server.

    A device behind RPC is the nearest thing to a GPU that runs anywhere: its buffers are not in this
    process's memory. Set ``LLAMA_CPP_LIB_PATH`` to the folder before ``llama_cpp`` is imported.
    """
    folder = cache() / f"build-rpc-{locked()[0]}"
    options = ["-DGGML_RPC=ON", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_TOOLS=ON"]
    server = _cmake("ggml-rpc-server", folder, options)
    for target in ("llama", "mtmd"):  # `llama_cpp` loads both
        _cmake(target, folder, options)
    return folder / "bin", server


def _cmake(name: str, folder: Path, options: Sequence[str] = ()) -> Path:
    """llama.cpp's own build of one target: without server, examples, TLS, and tuning for this CPU."""
    if not _program("cmake") or not _program("ninja"):
        raise Unavailable("no cmake or ninja: pip install cmake ninja")
    off = [
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_SERVER",
        "LLAMA_BUILD_APP",
        "LLAMA_OPENSSL",
        "GGML_NATIVE",
        "LLAMA_ALL_WARNINGS",
        "GGML_CCACHE",
        "GGML_OPENMP",
    ]
    _run(
        [
            _program("cmake"),
            "-S",
            str(source()),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
            "-DLLAMA_BUILD_TESTS=ON",
            *(f"-D{option}=OFF" for option in off),
            *options,
        ]
    )
    _run([_program("cmake"), "--build", str(folder), "--target", name])
    return folder / "bin" / name


def _program(name: str) -> str:
    beside = Path(sys.executable).parent  # wheels put cmake and ninja there
    return shutil.which(name, path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}") or ""


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name} failed:\n" + "\n".join(done.stdout.splitlines()[-20:]))


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["llama-gguf-split"]:
        print(tool(wanted))
