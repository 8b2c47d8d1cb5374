"""The command line as people type it: exit codes, one-line errors, and files that are what they should be."""

import errno
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest

from dfqs_nb import merge as merging
from dfqs_nb.core.files import write_text
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.core.prompts import load_prompts
from dfqs_nb.gguf import broken as specimens
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf.header import read_header
from dfqs_nb.ladder.divergence import Documents
from dfqs_nb.ladder.imatrix import read_imatrix
from dfqs_nb.workbook import cli, terminal

MERGED = registry.registered()["dfqs-nano-iq1_s-xl"].merged_sha256
FIRST, SECOND = map(str, specimens.reference_shards().paths)


def dfqs(*words: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dfqs_nb", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(REPOSITORY)},
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_models_lists_every_name():
    done = dfqs("models")
    assert done.returncode == 0 and all(name in done.stdout for name in registry.registered())


def test_inspect_counts_the_tensors_of_all_shards():
    done = dfqs("inspect", SECOND)
    assert done.returncode == 0, done.stderr
    assert "shard 2 of 2" in done.stdout
    for text in ("126", "14,880,349", "2 of 16 experts a token", "IQ1_S, Q2_K"):
        assert text in done.stdout


def test_inspect_says_what_is_wrong_and_what_to_do(tmp_path):
    done = dfqs("inspect", specimens.glue(tmp_path))
    assert done.returncode == 1
    assert "raw concatenation" in done.stdout and "dfqs-nb repair" in done.stdout
    assert "llama.cpp's loader takes this file, once it is repaired" in done.stdout
    assert "fits, weights and all (graphics cards not counted; `" in done.stdout
    assert "loader" not in dfqs("inspect", FIRST, "--quick").stdout


def test_inspect_goes_on_after_a_file_that_cannot_be_read(tmp_path):
    done = dfqs("inspect", "--quick", tmp_path / "none.gguf", FIRST)
    assert done.returncode == 1 and "none.gguf: cannot be read" in done.stdout
    assert "shard 1 of 2; all 2 are here" in done.stdout and not done.stderr


def test_inspect_of_a_byte_part_says_how_to_join(tmp_path):
    whole, first = specimens.reference_shards().paths[1].read_bytes(), tmp_path / "w.gguf.part1of2"
    first.write_bytes(whole[:1_000_000])
    (tmp_path / "w.gguf.part2of2").write_bytes(whole[1_000_000:])
    done = dfqs("inspect", first)
    command = re.search(r"`(\(set -C; printf [^`]*)`", done.stdout)
    assert done.returncode == 1 and command, done.stdout
    subprocess.run(command[1], shell=True, check=True)
    assert (tmp_path / "w.gguf").read_bytes() == whole


def test_merge_by_registered_name(tmp_path):
    out = tmp_path / "out.gguf"
    done = dfqs("merge", "dfqs-nano-iq1_s-xl", "-o", out)
    assert done.returncode == 0 and MERGED in done.stdout and sha256(out) == MERGED
    again = dfqs("merge", FIRST, "-o", out)
    assert again.returncode == 1 and "exists already" in again.stderr
    assert dfqs("merge", FIRST, SECOND, "-o", out, "--overwrite").returncode == 0


def test_repair_and_verify(tmp_path):
    glued = specimens.glue(tmp_path)
    assert dfqs("repair", glued, "--in-place").returncode == 0 and sha256(glued) == MERGED
    proof = dfqs("verify", glued, "--sha256", MERGED, "--against", SECOND)
    assert proof.returncode == 0 and "the tensors of its shards" in proof.stdout, proof.stderr
    with glued.open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\xff\x00\xff")
    damaged = dfqs("verify", glued)
    assert damaged.returncode == 1 and "1 of 126 tensors differ" in damaged.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "none.gguf"),
        ("merge", "none.gguf", "-o", "x.gguf"),
        ("repair", FIRST, "--in-place"),
        ("verify", "none.gguf"),
    ],
)
def test_errors_are_one_line_and_no_traceback(words, tmp_path):
    done = dfqs(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dfqs-nb: "), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("merge", "x"), "Missing option '-o'"),
        (("inspct", "x"), "No such command 'inspct'. Did you mean 'inspect'"),
        (("repair", "x"), "either -o OUTPUT or --in-place"),
        (("score", "x", "--tier", "big"), "'big' is not one of 'nano', 'standard'"),
        (("score", "http://127.0.0.1:1", "--timeout", "0"), "Invalid value for '--timeout'"),
        (("deploy", "ollama", "x", "--port", "70000"), "Invalid value for '--port'"),
        ((), "Usage: dfqs-nb"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong_with_it(words, says, capsys):
    assert cli.main(list(words)) == 2
    assert says in " ".join(re.sub("[│╭╮╰╯─]", " ", "".join(capsys.readouterr())).split())


def test_inspect_starts_without_the_heavy_imports():
    code = "import sys, dfqs_nb.workbook.cli as c; c.main(['inspect', '--quick', sys.argv[1]])"
    code += "; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, FIRST], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded.isdisjoint({"numpy", "pandas", "matplotlib", "llama_cpp", "gguf", "huggingface_hub"})
    assert loaded.isdisjoint({"psutil", "tomllib", "dfqs_nb.merge.merge", "dfqs_nb.gguf.memory"})


def test_quantize_plans_every_tensor_and_writes_what_it_planned(tmp_path, capsys):
    out = tmp_path / "rung.gguf"
    asked = ("quantize", "dfqs-nano-f16", "q8_0")
    dry = dfqs(*asked, "--dry-run")
    assert dry.returncode == 0 and not list(tmp_path.iterdir()), dry.stderr
    size = int(dry.stdout.split("would be ")[1].split()[0].replace(",", ""))
    done = dfqs(*asked, "-o", out)
    assert done.returncode == 0, done.stderr
    header = read_header(out)
    assert sum(tensor.nbytes for tensor in header.tensors) == size and f"{size:,} bytes" in done.stdout
    assert header.get("dfqs.source_sha256") == registry.registered()["dfqs-nano-f16"].files[0].sha256
    assert header.get("dfqs.recipe") == "Q8_0"
    assert cli.main([*asked, "-o", str(out)]) == 1 and "exists already" in capsys.readouterr().err
    assert cli.main([*asked]) == 1 and "no output was named" in capsys.readouterr().err


def test_quantize_into_a_folder_that_does_not_exist_is_refused_before_it_calibrates(tmp_path, capsys):
    asked = ["quantize", "dfqs-nano-f16", "iq1_s-xl", "-o", str(tmp_path / "missing" / "x.gguf")]
    assert cli.main([*asked, "--calibrate", "calibration-nano"]) == 1
    assert "its folder does not exist; make the folder first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quantize_collects_the_importance_matrix_that_a_recipe_needs(tmp_path, capsys):
    out, text = tmp_path / "rung.gguf", tmp_path / "text.txt"
    asked = ("quantize", "dfqs-nano-f16", "iq1_s-xl", "-o", str(out))
    assert cli.main([*asked]) == 1 and "requires an imatrix" in capsys.readouterr().err
    assert not out.exists()
    documents = load_prompts("calibration-nano", Documents).calibration
    text.write_text("\n".join(" ".join(document) for document in documents)[:10_000], encoding="utf-8")
    done = dfqs(*asked, "--calibrate", text)
    assert done.returncode == 0 and not done.stderr, done.stderr
    kept = read_imatrix(tmp_path / "rung.gguf.imatrix.gguf")
    assert read_header(out).get("quantize.imatrix.entries_count") == sum(
        "_exps." in name for name in kept.entries
    )


def test_every_command_shows_what_it_does_and_an_example():
    from dfqs_nb.workbook import cli

    with pytest.raises(SystemExit):
        raise SystemExit(cli.main(["--version"]))
    commands = cli.program().commands
    assert {"run", "inspect", "merge", "score", "report", "sweep", "deploy"} <= set(commands)
    for name, command in commands.items():
        assert name == "models" or "`dfqs-nb " in command.help, f"{name} shows no example"
        assert all(option.help for option in command.params if hasattr(option, "help")), name


def test_the_command_that_was_typed_is_built_alone_and_any_other_word_gets_them_all():
    assert list(cli.program("inspect").commands) == ["inspect"]
    assert list(cli.program("inspct").commands) == list(cli.program().commands)


def test_a_folder_where_a_file_should_be_is_one_plain_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "table.csv").mkdir()

    def write():
        write_text(tmp_path / "table.csv", "text")

    monkeypatch.setattr(registry, "registered", write)
    assert cli.main(["models"]) == 1
    assert capsys.readouterr().err.endswith("table.csv: cannot be read or written (Is a directory)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_an_interrupt_is_one_line_that_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_folder", interrupted)
    assert cli.main(["report"]) == 130
    assert "interrupted; what was written stays" in capsys.readouterr().err


def test_a_full_disk_is_named_with_what_to_do(monkeypatch, capsys):
    def full(name):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "run_folder", full)
    assert cli.main(["report"]) == 1
    error = capsys.readouterr().err
    assert "the disk: cannot be read or written (No space left on device); free some space" in error, error


def test_a_file_that_cannot_be_written_is_named_as_the_user_did_and_with_what_to_do(monkeypatch, capsys):
    def read_only(name):
        raise OSError(errno.EROFS, "Read-only file system", "/ro/.leaderboard.csv.34d7545734d75457.tmp")

    monkeypatch.setattr(cli, "run_folder", read_only)
    assert cli.main(["report"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dfqs-nb: /ro/leaderboard.csv: cannot be read or written (Read-only file system)")
    assert "; check its rights, or take another folder" in error


def test_a_record_is_not_begun_where_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.os, "access", lambda *_: False)
    monkeypatch.setattr(cli, "open_model", lambda *_: pytest.fail("the model was opened"))
    assert cli.main(["record", "m.gguf", "-o", str(tmp_path / "r.jsonl"), "--prompts", "nano-reasoning"]) == 1
    assert "r.jsonl: cannot be written; take a folder that you may write" in capsys.readouterr().err


def test_a_deleted_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err == "dfqs-nb: the current folder was deleted: go to another one (`cd`)\n"


def test_what_nobody_foresaw_is_one_line_and_a_traceback_in_a_log(tmp_path, monkeypatch, capsys):
    from dfqs_nb.gguf import models
    from dfqs_nb.workbook import cli

    def broken():
        raise ZeroDivisionError("a bug\nwith a second line")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(models, "registered", broken)
    assert cli.main(["models"]) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"unexpected ZeroDivisionError: a bug; its place in the code is in {tmp_path}" in error
    )
    assert "in broken" in (tmp_path / cli.LOG).read_text()
    (tmp_path / cli.LOG).unlink()
    (tmp_path / cli.LOG).symlink_to("/dev/full")  # as on a full disk
    assert cli.main(["models"]) == 1
    assert "unexpected ZeroDivisionError: a bug" in capsys.readouterr().err


def test_text_from_a_file_does_not_steer_the_terminal(capsys):
    from dfqs_nb.workbook.terminal import say

    say("a\x1b]0;title\x07b")
    assert "\x1b" not in capsys.readouterr().out


def test_a_run_that_does_not_exist_is_named_with_those_that_do(tmp_path, monkeypatch, capsys):
    from dfqs_nb.workbook import cli

    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "merge.json").write_text("{}")
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    assert cli.main(["report", "nanno", "--check"]) == 1
    assert "no run is called 'nanno'; did you mean nano?" in capsys.readouterr().err


def test_a_target_that_is_none_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    assert cli.main(["deploy", "nothing", FIRST]) == 1
    assert "no target is called 'nothing'" in capsys.readouterr().err and not (tmp_path / "outputs").exists()


def test_routing_of_what_is_no_model_makes_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    assert cli.main(["routing", str(REPOSITORY / "README.md")]) == 1
    assert "not a GGUF file" in capsys.readouterr().err and not (tmp_path / "outputs").exists()


def test_a_table_without_rows_is_not_printed(capsys):
    terminal.say_table(pd.DataFrame({"a": [0.25]}))
    terminal.say_table(pd.DataFrame(columns=["a"]))
    assert capsys.readouterr().out.split() == ["a", "0.250"]


def test_what_is_no_plain_file_or_is_an_address_is_refused_at_once(tmp_path, capsys):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for arguments, words in (
        (["score", "dfqs-nano-iq1_s-xl", "--set", str(pipe)], "not a regular file"),
        (["sweep", str(pipe)], "not a regular file"),
        (["verify", "https://huggingface.co/someone/models/blob/main/m.gguf"], "download the file"),
        (["inspect", str(tmp_path / "missing.gguf")], "check the path (`"),
        (["verify", "missing.gguf", "--sha256", "abc"], "give its 64 hexadecimal digits"),
    ):
        assert cli.main(arguments) == 1
        assert words in capsys.readouterr().err


def test_a_folder_called_like_a_library_in_the_current_one_is_not_imported(tmp_path):
    for name in ("llama_cpp", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    command = [sys.executable, "-m", "dfqs_nb", "inspect", str(tmp_path / "typer.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "planted" not in done.stderr and done.returncode == 1 and "typer.py" in done.stdout


def test_plan_prints_the_command_and_other_machines_only_if_asked():
    done = dfqs("plan", FIRST, "--context", "1024", "--ram-gbs", "10")
    assert done.returncode == 0, done.stderr
    for words in ("llama.cpp's loader takes", "llama-server -m", "-ngl 0", "at most", "cards not counted"):
        assert words in done.stdout
    assert "96 GiB" not in done.stdout, "a model that fits here fits there, too"
    done = dfqs("plan", FIRST, "--context", "1024", "--ram-gbs", "10", "--ram", "64GB,96GB")
    assert re.findall(r"^(\d+ GiB) .* 0 B ", done.stdout, re.M) == ["64 GiB", "96 GiB"], done.stdout
    done = dfqs("plan", FIRST, "--context", "1024", "--ram-gbs", "10", "--vram", "8GB,8GB")
    assert "no bound on speed: GPU not measured; give --gpu-gbs, in GB/s" in done.stdout, done.stderr
    assert " -fa on " in done.stdout, "2 GiB of a card are not enough without"
    assert "the cache is an estimate" not in done.stdout and "cards not counted" not in done.stdout
    assert "largest context with no weights read from the disk: " in done.stdout
    compute = re.findall(r"^(GPU \d|RAM) .* (unknown|\d+\.\d MB) ", done.stdout, re.M)
    assert [name for name, size in compute if size == "unknown"] == ["GPU 0", "GPU 1"], done.stdout
    done = dfqs("plan", FIRST, "--vram", "lots")
    assert done.returncode == 1 and "'lots' is no size; write 64GiB" in done.stderr
    done = dfqs("plan", FIRST, "--context", "9999999")
    assert done.returncode == 1 and "give --context" in done.stderr


def test_a_plan_for_this_machine_counts_its_cards(tmp_path, monkeypatch):
    (tool := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 8192\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for words, layers in (((), 99), (("--vram", "0"), 0), (("--ram", "64GB"), 0)):
        done = dfqs("plan", FIRST, "--context", "1024", "--ram-gbs", "10", *words)
        assert f" -ngl {layers} " in done.stdout, done.stdout + done.stderr
        assert ("GPU 0 " in done.stdout) == ("cards not counted" not in done.stdout) == (layers > 0)


def test_the_largest_context_of_a_plan_is_one_that_fits_and_does_not_depend_on_the_question():
    """The first needs 4 MiB of weights and more for cache and buffer, by the context."""

    def largest(context, memory="44M"):
        done = dfqs("plan", FIRST, "--ram", memory, "--context", context, "--ram-gbs", 10, "--disk-gbs", 1)
        told = re.findall(r"^largest context with (no |)weights read .*: ([\d,]+|none)", done.stdout, re.M)
        works = "llama-server -m" in done.stdout
        assert works != ("lower --context" in done.stdout), done.stdout
        return {kind: int(n.replace(",", "")) for kind, n in told if n != "none"}, works

    small, works = largest(256)
    assert works and 256 < small["no "] < 32768, "the memory is chosen so"
    for context in (small["no "], small["no "] + 512, 32768):
        again, works = largest(context)
        assert abs(again["no "] - small["no "]) <= 256, context
        assert ("" in again) == (context > again["no "]), "with paging only where the plan needs it"
        assert works == (context <= max(again.values()))
    done = dfqs("plan", FIRST, "--ram", "1GB,2GB", "--vram", "3GB", "--context", 256, "--ram-gbs", 10)
    assert re.findall(r"^(\d GiB \+ 3 GiB) ", done.stdout, re.M) == ["1 GiB + 3 GiB", "2 GiB + 3 GiB"]


def test_the_command_of_a_plan_names_the_file_wherever_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "models" / "m.gguf"
    model.parent.mkdir()
    merging.merge_model([FIRST], model)
    for place in (model, "models/m.gguf", "dfqs-nano-iq1_s-xl"):
        done = dfqs("plan", place, "--context", "256", "--ram-gbs", "10", "--ram", "64GB", cwd=tmp_path)
        words = shlex.split(done.stdout.split("\n\n")[-1])
        assert words[:2] == ["llama-server", "-m"] and (tmp_path / words[2]).is_file(), done.stdout


def test_diff_names_what_differs_by_its_exit_status():
    assert dfqs("diff", FIRST, "dfqs-nano-iq1_s-xl").returncode == 0
    done = dfqs("diff", FIRST, "dfqs-nano-q8_0")
    assert done.returncode == 1 and "blk.0." in done.stdout


def test_diff_of_unlike_models_lists_the_first_of_each_kind():
    unlike = ("diff", FIRST, "dfqs-nano-f16")
    printed = [dfqs(*words).stdout for words in (unlike, (*unlike, "--all"))]
    short, full = (
        [part.splitlines() for part in re.split(r"^(?=\w)", text, flags=re.M)[1:]] for text in printed
    )
    for few, every in zip(short, full, strict=True):
        assert few[:21] == every[:21], "a count, and 20 lines"
        more = len(every) - 21
        assert few[21:] == ([f"  and {more} more, which --all lists"] if more > 0 else [])
    assert max(map(len, full)) > 21
