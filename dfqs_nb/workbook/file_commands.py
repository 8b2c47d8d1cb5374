"""Commands for files: what a file is, one sound file out of what there is, and other types."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from typer import Argument, Option

from dfqs_nb.core.errors import DfqsError, HeaderError, ShardError, SpaceError
from dfqs_nb.workbook.app import FILES, OVERWRITE, QUIET, THREADS, app, say, say_table

GLUED = Argument(..., metavar="FILE", help="The glued file.")
OUTLOOK_N_CTX = 4096  # tokens, for the memory of a model that is not here


@app.command(rich_help_panel=FILES)
def inspect(
    paths: list[str] = Argument(..., metavar="FILE...", help="Any file, here or at hf://... or https://..."),
    llama_cpp: bool = Option(False, "--llama-cpp", help="Also ask llama.cpp's loader."),
) -> None:
    """Say what a file is, in milliseconds, from headers, sizes and names alone; changes nothing.

    For an address it fetches only the headers. It says whether llama.cpp knows the model and whether it fits.
    Exit status 1: at least one file is not a sound model.

    Examples: `dfqs-nb inspect model.gguf`, `dfqs-nb inspect hf://owner/repo/model.gguf`
    """
    sound = [_inspect(path, llama_cpp) for path in paths]
    raise typer.Exit(int(not all(sound)))


def _inspect(path: str, llama_cpp: bool) -> bool:
    from dfqs_nb.gguf import models, remote
    from dfqs_nb.llama.check import loader_verdict
    from dfqs_nb.merge import diagnose

    with ExitStack() as stack:
        copy = stack.enter_context(remote.headers_of(path)) if models.is_address(path) else None
        local = copy.path if copy else Path(path)
        diagnosis = diagnose(local, allow_holes=copy is not None)
        rows, step = _header_rows(local) if diagnosis.sound else dict(diagnosis.evidence), diagnosis.next_step
        if copy:
            step = step and f"after the download: {step.replace(f'{local.parent}/', '')}"
            rows["read over the network"] = f"{copy.fetched_bytes:,} bytes of headers"
            if diagnosis.sound or diagnosis.kind == "raw concatenation":
                rows |= _outlook(local)
        elif llama_cpp:
            rows["llama.cpp"] = loader_verdict(local).reason or "loads"
        say(f"{remote.shown(path)}: {diagnosis.kind}\n  {diagnosis.finding}")
        if step:
            say(f"  -> {step}")
        for what, value in rows.items():
            say(f"  {what + ':':<28}{format(value, ',') if type(value) is int else value}")
        return diagnosis.sound


def _outlook(path: Path) -> dict[str, Any]:
    """Whether llama.cpp knows the model of these headers, glued or not, and what it needs of this machine."""
    from dfqs_nb.gguf import memory, remote
    from dfqs_nb.llama.check import loader_verdict

    try:
        with remote.outline(path) as model:
            verdict = loader_verdict(model.path).explain(model.shards.as_one)
            verdict += ", once it is repaired" if model.glued else ""
            needs = memory.estimate(model.shards.as_one, OUTLOOK_N_CTX)
            fits = memory.check_fits(needs) or "fits, weights and all"
    except ShardError as error:
        return {"the whole set": error.what}
    except (HeaderError, SpaceError) as error:
        fits = error.what
    return {"llama.cpp": verdict, f"memory, {OUTLOOK_N_CTX:,} tokens": fits}


def _header_rows(path: Path) -> dict[str, Any]:
    """The whole model's facts, from all its shards when they are there."""
    from dfqs_nb.gguf import facts
    from dfqs_nb.gguf.header import read_header
    from dfqs_nb.gguf.shards import open_shards

    try:
        header = open_shards(path).as_one
    except ShardError:
        header = read_header(path)
    known = facts.identity(header) | facts.architecture(header)
    rows, experts = {k: value for k, value in known.items() if value != "not stated"}, facts.experts(header)
    if experts.total:
        layers = f"{experts.moe_layers} layers, {experts.hash_layers} of them by hash"
        rows["experts"] = f"{experts.used} of {experts.total} a token, {experts.shared} shared, {layers}"
    for row in facts.class_sizes(header):
        bits = f"{row['bytes']:>16,} bytes {row['bits_per_weight']:7.2f} bits a weight"
        rows[row["class"]] = f"{bits}  {row['types']}"
    return rows


@app.command(rich_help_panel=FILES)
def merge(
    paths: list[str] = Argument(..., metavar="SHARD...", help="Any shard, or all, or a registered name."),
    output: Path = Option(..., "-o", "--output", help="The merged file."),
    consume: bool = Option(False, "--consume", help="DELETES the shards on the way; needs 64 MiB of disk."),
    dry_run: bool = Option(False, "--dry-run", help="Check everything, write nothing."),
    overwrite: bool = OVERWRITE,
    quiet: bool = QUIET,
) -> None:
    """Merge shards (or join byte parts) into one proven file; resumes after a kill.

    Example: `dfqs-nb merge model-00001-of-00002.gguf -o model.gguf`
    """
    from dfqs_nb.merge import merge_model, open_source

    if dry_run:
        plan = open_source(paths).dry_run(output, overwrite=overwrite, consume=consume)
        say(f"{len(plan.sources)} file(s) -> {output}: {plan.nbytes:,} bytes; nothing was written")
    else:
        _say_made(merge_model(paths, output, overwrite=overwrite, consume=consume, progress=not quiet))


def _say_made(*results: Any) -> None:
    for result in results:
        say(f"{result.path}: {result.nbytes:,} bytes, read back equal, in {result.seconds:,.1f} s")
        say(f"SHA-256 {result.sha256}")


@app.command(rich_help_panel=FILES)
def repair(
    path: str = GLUED,
    output: str = Option("", "-o", "--output", help="The sound file."),
    in_place: bool = Option(False, "--in-place", help="DELETES FILE, puts the model there; needs 64 MiB."),
    overwrite: bool = OVERWRITE,
    quiet: bool = QUIET,
) -> None:
    """Repair a file of glued shards: write the sound model that is in it.

    Example: `dfqs-nb repair DeepSeek-V4-Flash-IQ1_S-XL.gguf --in-place`
    """
    from dfqs_nb.merge import repair as make

    if bool(output) == in_place:
        raise typer.BadParameter("give either -o OUTPUT or --in-place")
    _say_made(make(path, output or None, in_place=in_place, overwrite=overwrite, progress=not quiet))


@app.command(rich_help_panel=FILES)
def split(
    path: str = GLUED,
    folder: Path | None = Option(None, "-d", "--folder", help="Where the shards go. Default: beside FILE."),
    overwrite: bool = OVERWRITE,
    quiet: bool = QUIET,
) -> None:
    """Split a file of glued shards at its inner headers.

    Example: `dfqs-nb split glued.gguf`
    """
    from dfqs_nb.merge import open_source

    _say_made(*open_source(path).split(folder, overwrite=overwrite, progress=not quiet))


@app.command(rich_help_panel=FILES)
def verify(
    path: str = Argument(..., metavar="FILE", help="The model's file."),
    sha256: str = Option("", help="The expected SHA-256 of the file."),
    against: list[str] = Option(None, metavar="SHARD", help="Any shard; or repeat the option for each."),
    write_manifest: bool = Option(False, "--write-manifest", help="Keep the hashes beside FILE, for later."),
    data: bool = Option(False, "--data", help="Also look for runs of zeros, and scales that are no numbers."),
    quiet: bool = QUIET,
) -> None:
    """Compare every tensor with the file's manifest, a published hash, or its shards.

    Example: `dfqs-nb verify model.gguf --against model-00001-of-00002.gguf`
    """
    from dfqs_nb.merge import verify_model

    shards = against[0] if against and len(against) == 1 else against or None
    options: dict[str, Any] = {"data": data, "write_manifest": write_manifest, "progress": not quiet}
    result = verify_model(path, sha256=sha256 or None, against=shards, **options)
    say(f"{result.path}: {result.nbytes:,} bytes, {len(result.tensors):,} tensors, SHA-256 {result.sha256}")
    for sentence in result.meaning:
        say(f"  {sentence}")
    if write_manifest:
        say(f"  kept in {result.path.name}.manifest.json")
    raise typer.Exit(int(not result.diagnosis.sound))


@app.command(rich_help_panel=FILES)
def quantize(
    source: str = Argument(..., metavar="MODEL", help="F32, F16 or BF16: a name or a file."),
    recipe: str = Argument(..., help="A name in data/quantize/, or a .toml file."),
    output: str = Option("", "-o", "--output", help="Required unless --dry-run."),
    imatrix: str = Option("", metavar="FILE", help="An importance matrix, from llama-imatrix or from us."),
    calibrate: str = Option("", metavar="TEXT", help="Collect one over this text or prompt set; it is kept."),
    threads: int = THREADS,
    dry_run: bool = Option(False, "--dry-run", help="List types and exact sizes; write nothing."),
    overwrite: bool = OVERWRITE,
    quiet: bool = QUIET,
) -> None:
    """Quantize a model tensor by tensor as a recipe says, with llama.cpp's own quantizer.

    Example: `dfqs-nb quantize dfqs-nano-f16 iq1_s-xl -o small.gguf --calibrate calibration-nano`
    """
    from dfqs_nb import ladder
    from dfqs_nb.gguf import models as registry

    path, chosen = registry.resolve(source)[0], ladder.load_recipe(recipe)
    if not (output or dry_run):
        raise DfqsError("no output was named", hint="pass -o FILE, or --dry-run to see what it would be")
    if imatrix and calibrate:
        raise typer.BadParameter("give either --imatrix or --calibrate")
    work: dict[str, Any] = {"n_threads": threads, "progress": not quiet}
    matrix: Any = ladder.collect(path, calibrate, **work) if calibrate and chosen.weights else imatrix or None
    if dry_run:
        plan = ladder.plan(path, chosen, matrix)
    else:
        if calibrate and chosen.weights:
            matrix.save(Path(f"{output}.imatrix.gguf"))
        plan = ladder.quantize(path, chosen, output, imatrix=matrix, overwrite=overwrite, **work)
    say_table(plan.by_class(), ".2f")
    where = "would be" if dry_run else f"{output}:"
    size = f"{where} {plan.nbytes:,} bytes, {plan.bits_per_weight:.2f} bits a weight"
    say("\n".join([*plan.notes, size]))
