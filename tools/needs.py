"""What an install needs of the machine, and what to do where that is missing: in plain words.

As `install.py`, for any Python: old syntax, standard library only.
"""

import os
import re
import shutil
import subprocess
import tempfile

OLDEST, TOO_NEW = (3, 11), (3, 14)  # as requires-python in pyproject.toml
PYTHONS = ["python3", "python", "python3.13", "python3.12", "python3.11"]

NO_COMPILER = """llama-cpp-python is built from source and needs a C and C++ compiler: {found}.
  Debian, Ubuntu   sudo apt install build-essential
  Fedora, RHEL     sudo dnf install gcc gcc-c++
  macOS            xcode-select --install
  conda            conda install -c conda-forge cxx-compiler
Or name your own: CC=/path/to/cc CXX=/path/to/c++ make run"""

NO_CUDA = """CUDA's compiler (nvcc) was not found, and CMAKE_ARGS asks for a llama.cpp for NVIDIA cards.
  it is here, but not on the PATH   PATH=/path/to/cuda/bin:$PATH CMAKE_ARGS=-DGGML_CUDA=on make venv
  Debian, Ubuntu                    sudo apt install nvidia-cuda-toolkit   (then the same command again)
  without a card                    env -u CMAKE_ARGS make venv"""

NO_PYTHON = """Python 3.11, 3.12 or 3.13 is needed. Here: {found}.
  Debian, Ubuntu   sudo apt install python3 python3-venv   (if that is older than 3.11: use conda)
  Fedora, RHEL     sudo dnf install python3.12
  macOS            brew install python@3.12
  conda            conda env create -f environment.yml
Or name your own: make run PYTHON=/path/to/python3.12"""

NO_VENV = """{python} ({version}) cannot make virtual environments: its module venv or ensurepip is missing.
  Debian, Ubuntu   sudo apt install python{version}-venv
Or name another Python: make run PYTHON=/path/to/python3.12"""

NO_SPACE = """not enough free disk under {folder}: {free:.1f} GB free, about {needed:.1f} GB needed.
Free some, or use another disk: make run VENV=/disk/venv TMPDIR=/disk/tmp UV_CACHE_DIR=/disk/cache"""

NO_NETWORK = """the package index cannot be reached{or_lacks}.
The install downloads about 300 MB over HTTPS from the Python package index and its file host. Check
the connection and the proxy (HTTPS_PROXY), or name a mirror (PIP_INDEX_URL). Without any network: run
`make wheelhouse` on a machine that has one, copy the folder wheelhouse/ here, then
  make run PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse"""

NOT_IN_WHEELHOUSE = """a package of requirements.lock is not in the folder that PIP_FIND_LINKS names.
Make that folder with `make wheelhouse`, on a machine of the same system and with the same Python."""

BAD_HASH = """a downloaded file does not have the hash that requirements.lock records: an interrupted
download, or a mirror that changed the file. Run the command again. If that fails too, use another mirror."""

DISK_FULL = "the disk filled up during the install. It needs about 2 GB: in .venv, TMPDIR and uv's cache."

CAUSES = [
    (r"No space left on device|Errno 28|Disk quota exceeded", DISK_FULL),
    (r"DO NOT MATCH THE HASHES|HashMismatch|Hash mismatch", BAD_HASH),
    (
        r"NewConnectionError|Connection(Reset|Aborted)?Error|ConnectTimeout|ReadTimeout|timed out|ProxyError"
        r"|SSLError|Name or service not known|Temporary failure in name resolution|nodename nor servname"
        r"|Connection refused|Network is unreachable|connection broken|error sending request",
        NO_NETWORK.format(or_lacks=""),
    ),
    (
        r"No matching distribution found|Could not find a version|No solution found",
        NO_NETWORK.format(or_lacks=", or lacks a file of requirements.lock"),
    ),
    (r"CUDA Toolkit not found|No CMAKE_CUDA_COMPILER could|The CMAKE_CUDA_COMPILER:", NO_CUDA),
    (r"CMAKE_(C|CXX)_COMPILER", NO_COMPILER.format(found="the compiler found here did not work")),
]


class Stop(Exception):
    """The machine lacks something; the text says what, and what to install."""


def explain(text, offline):  # type: (str, bool) -> str
    """The cause of a failed pip or uv, from what it printed."""
    for pattern, cause in CAUSES:
        if re.search(pattern, text):
            return NOT_IN_WHEELHOUSE if offline and cause.startswith("the package index") else cause
    return "the last lines it printed:\n" + "\n".join("  " + line for line in text.splitlines()[-8:])


def output(command):  # type: (list[str]) -> str | None
    """What a command prints, or None when it cannot be started or fails."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError:
        return None
    text = process.communicate()[0].decode("utf-8", "replace").strip()
    return text if process.returncode == 0 else None


def python_version(python):  # type: (str) -> tuple[int, int] | None
    """(major, minor) of an interpreter, or None when it does not run."""
    text = output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    match = re.match(r"(\d+)\.(\d+)$", text or "")
    return (int(match.group(1)), int(match.group(2))) if match else None


def is_suitable(version):  # type: (tuple[int, int] | None) -> bool
    return version is not None and OLDEST <= version < TOO_NEW


def find_python(wanted=""):  # type: (str) -> str
    """The wanted interpreter, or the first suitable one of the usual names.

    Raises:
        Stop: it is missing, too old, too new, or cannot make environments.
    """
    seen = []
    for python in [wanted] if wanted else PYTHONS:
        version = python_version(python)
        name = "%d.%d" % version if version else "not a Python that runs"
        if is_suitable(version):
            if output([python, "-c", "import venv, ensurepip"]) is None:
                raise Stop(NO_VENV.format(python=python, version=name))
            return python
        if version or wanted:
            seen.append("%s is %s" % (python, name))
    raise Stop(NO_PYTHON.format(found=", ".join(seen) or "none"))


def check_compiler():  # type: () -> None
    """Compile a little C and C++: a compiler that is only a stub, or lacks headers, fails here."""
    folder = tempfile.mkdtemp(prefix="dfqs-compiler-")
    try:
        for suffix, variable, usual, include in (
            ("c", "CC", ["cc", "gcc", "clang"], "stdio.h"),
            ("cpp", "CXX", ["c++", "g++", "clang++"], "string"),
        ):
            source, target = os.path.join(folder, "try." + suffix), os.path.join(folder, "try.o")
            with open(source, "w") as file:
                file.write("#include <%s>\nint main(void) { return 0; }\n" % include)
            names = [os.environ[variable]] if os.environ.get(variable) else usual
            if not any(output(name.split() + ["-c", source, "-o", target]) is not None for name in names):
                raise Stop(NO_COMPILER.format(found="none of these works: " + ", ".join(names)))
    finally:
        shutil.rmtree(folder)


def check_disk(needs):  # type: (dict[str, int]) -> None
    """Refuse an install that a disk cannot hold; `needs` is {folder, which need not exist: bytes}."""
    on_disk = {}  # type: dict[int, int]
    for folder, needed in needs.items():
        there = os.path.abspath(folder)
        while not os.path.isdir(there):
            there = os.path.dirname(there)
        state, disk = os.statvfs(there), os.stat(there).st_dev
        on_disk[disk] = on_disk.get(disk, 0) + needed
        free = state.f_bavail * state.f_frsize
        if free < on_disk[disk]:
            raise Stop(NO_SPACE.format(folder=there, free=free / 1e9, needed=on_disk[disk] / 1e9))
