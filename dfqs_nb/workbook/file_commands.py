"""Commands for files: what a file is, one sound file out of what there is, and other types."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.workbook.cli import FILES, app, say

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output once the new one is proven.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]
OUTLOOK_N_CTX = 4096  # tokens, for the memory of a model that is not here


@app.command(rich_help_panel=FILES)
def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Anything that should be a model, here or at hf://... or https://..."
        ),
    ],
    llama_cpp: Annotated[bool, typer.Option("--llama-cpp", help="Also ask llama.cpp's loader.")] = False,
) -> None:
    """Say what a file is, in milliseconds, from headers, sizes and names alone; changes nothing.

    Of an address it fetches the headers only, and says whether llama.cpp knows the model and whether it fits.

    Exit status 1: at least one is no sound model.

    Examples: `dfqs-nb inspect model.gguf`, `dfqs-nb inspect hf://owner/repo/model.gguf`
    """
    sound = [_inspect(path, llama_cpp) for path in paths]
    raise typer.Exit(int(not all(sound)))


def _inspect(path: str, llama_cpp: bool) -> bool:
    from dfqs_nb.gguf import remote
    from dfqs_nb.merge import diagnose
    from dfqs_nb.merge.kind import Kind

    with ExitStack() as stack:
        local, far = Path(path), remote.is_address(path)
        if far:
            copy = stack.enter_context(remote.headers_of(path))
            local = copy.path
        diagnosis = diagnose(local, allow_holes=far)
        say(f"{remote.shown(path)}: {diagnosis.kind}\n  {diagnosis.finding}")
        if diagnosis.next_step and far:
            say(f"  -> after the download: {diagnosis.next_step.replace(f'{local.parent}/', '')}")
        elif diagnosis.next_step:
            say(f"  -> {diagnosis.next_step}")
        _say_rows(_header_rows(str(local)) if diagnosis.sound else dict(diagnosis.evidence))
        if far:
            say(f"  {'read over the network:':<28}{copy.fetched_bytes:,} bytes of headers")
            if diagnosis.sound or diagnosis.kind is Kind.RAW_CONCATENATION:
                _say_rows(_outlook(local))
        elif llama_cpp:
            from dfqs_nb.llama.check import loader_verdict

            say(f"  {'llama.cpp:':<28}{loader_verdict(local).reason or 'loads'}")
        return diagnosis.sound


def _outlook(path: Path) -> dict[str, Any]:
    """Whether llama.cpp knows the model of these headers, glued or not, and what it needs of this machine."""
    from dfqs_nb.core.errors import HeaderError, ShardError, SpaceError
    from dfqs_nb.gguf import memory, remote
    from dfqs_nb.llama.check import loader_verdict

    try:
        with remote.outline(path) as model:
            verdict = loader_verdict(model.path).explain(model.shards.as_one)
            try:
                needs = memory.estimate(model.shards.headers, OUTLOOK_N_CTX)
                fits = memory.check_fits(needs) or "fits, weights and all"
            except (HeaderError, SpaceError) as error:
                fits = error.what
    except ShardError as error:
        return {"the whole set": error.what}
    return {
        "llama.cpp": f"{verdict}{', once it is repaired' if model.glued else ''}",
        f"memory, {OUTLOOK_N_CTX:,} tokens": fits,
    }


def _say_rows(rows: dict[str, Any]) -> None:
    for what, value in rows.items():
        say(f"  {what + ':':<28}{value:,}" if type(value) is int else f"  {what + ':':<28}{value}")


def _header_rows(path: str) -> dict[str, Any]:
    """The whole model's facts, from all its shards when they are there."""
    from dfqs_nb.core.errors import ShardError
    from dfqs_nb.gguf import facts
    from dfqs_nb.gguf.header import read_header
    from dfqs_nb.gguf.shards import open_shards

    try:
        header = open_shards(path).as_one
    except ShardError:
        header = read_header(path)
    rows = facts.identity(header) | facts.architecture(header)
    rows = {what: value for what, value in rows.items() if value != "not stated"}
    experts = facts.experts(header)
    if experts.total:
        rows["experts"] = (
            f"{experts.used} of {experts.total} a token, {experts.shared} shared, "
            f"{experts.moe_layers} layers, {experts.hash_layers} of them by hash"
        )
    for row in facts.class_sizes(header):
        bits = f"{row['bytes']:>16,} bytes {row['bits_per_weight']:7.2f} bits a weight"
        rows[str(row["class"])] = f"{bits}  {row['types']}"
    return rows


@app.command(rich_help_panel=FILES)
def merge(
    paths: Annotated[
        list[str], typer.Argument(metavar="SHARD...", help="Any one shard, or all; or a registered name.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The merged file.")],
    consume: Annotated[
        bool,
        typer.Option(
            "--consume",
            help="DELETES the shards while they are merged, so that 64 MiB of free disk are enough.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Merge shards (or join byte parts) into one proven file; goes on after a kill.

    Example: `dfqs-nb merge model-00001-of-00002.gguf -o model.gguf`
    """
    from dfqs_nb.merge import merge_model, open_source

    if dry_run:
        plan = open_source(paths).dry_run(output, overwrite=overwrite, consume=consume)
        say(
            f"{len(plan.sources)} file(s) -> {output}: {plan.nbytes:,} bytes, {len(plan.copies):,} copies; "
            "nothing was written"
        )
        return
    _say_written(merge_model(paths, output, overwrite=overwrite, consume=consume, progress=not quiet))


def _say_written(*results: Any) -> None:
    for result in results:
        say(f"{result.path}: {result.nbytes:,} bytes, read back equal, in {result.seconds:,.1f} s")
        say(f"SHA-256 {result.sha256}")


@app.command(rich_help_panel=FILES)
def repair(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The glued file.")],
    output: Annotated[str, typer.Option("-o", "--output", help="The sound file.")] = "",
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="DELETES FILE: the sound model replaces it. Needs 64 MiB of disk."),
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a sound model of shards that were glued together.

    Example: `dfqs-nb repair DeepSeek-V4-Flash-IQ1_S-XL.gguf --in-place`
    """
    from dfqs_nb.merge import repair as make

    if bool(output) == in_place:
        raise typer.BadParameter("give either -o OUTPUT or --in-place")
    _say_written(make(path, output or None, in_place=in_place, overwrite=overwrite, progress=not quiet))


@app.command(rich_help_panel=FILES)
def split(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The glued file.")],
    folder: Annotated[
        Path | None, typer.Option("-d", "--folder", help="Where the shards go. Default: beside FILE.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Cut glued shards apart again, at their inner headers.

    Example: `dfqs-nb split glued.gguf`
    """
    from dfqs_nb.merge import open_source

    _say_written(*open_source(path).split(folder, overwrite=overwrite, progress=not quiet))


@app.command(rich_help_panel=FILES)
def verify(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The model's file.")],
    sha256: Annotated[str, typer.Option(help="What the file's SHA-256 should be.")] = "",
    against: Annotated[
        list[str] | None, typer.Option(metavar="SHARD", help="Any one shard; or repeat it for each.")
    ] = None,
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Keep the hashes beside FILE, for a later check.")
    ] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Also look for runs of zeros and for scales that are not numbers.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare every tensor with the file's manifest, a published hash, or its shards.

    Example: `dfqs-nb verify model.gguf --against model-00001-of-00002.gguf`
    """
    from dfqs_nb.merge import verify_model

    shards = against[0] if against and len(against) == 1 else against or None
    result = verify_model(
        path,
        sha256=sha256 or None,
        against=shards,
        data=data,
        write_manifest=write_manifest,
        progress=not quiet,
    )
    say(f"{result.path}: {result.nbytes:,} bytes, {len(result.tensors):,} tensors, SHA-256 {result.sha256}")
    for sentence in result.meaning:
        say(f"  {sentence}")
    if write_manifest:
        say(f"  kept in {result.path.name}.manifest.json")
    raise typer.Exit(int(not result.diagnosis.sound))


@app.command(rich_help_panel=FILES)
def quantize(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="F32, F16 or BF16: a name or a file.")],
    recipe: Annotated[str, typer.Argument(help="A name in data/quantize/, or a .toml file.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Required unless --dry-run.")] = "",
    imatrix: Annotated[
        str, typer.Option(metavar="FILE", help="An importance matrix, of llama-imatrix or of the workbook.")
    ] = "",
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT", help="Collect one over this text or prompt set; it is kept.")
    ] = "",
    threads: Annotated[int, typer.Option(help="0: the usable cores.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List types and exact sizes; write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
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
    matrix: Any = imatrix or None
    if calibrate and chosen.weights:
        matrix = ladder.collect(path, calibrate, n_threads=threads, progress=not quiet)
        if not dry_run:
            matrix.save(Path(f"{output}.imatrix.gguf"))
    if dry_run:
        plan = ladder.plan(path, chosen, matrix)
    else:
        plan = ladder.quantize(
            path, chosen, output, imatrix=matrix, n_threads=threads, overwrite=overwrite, progress=not quiet
        )
    say(plan.by_class().to_string(index=False, float_format="{:.2f}".format))
    for note in plan.notes:
        say(note)
    where = "would be" if dry_run else f"{output}:"
    say(f"{where} {plan.nbytes:,} bytes, {plan.bits_per_weight:.2f} bits a weight")
