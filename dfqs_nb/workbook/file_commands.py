"""Commands for files: what a file is, one sound file out of what there is, where a model fits."""

from __future__ import annotations

import os
import platform
import shlex
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from typer import Argument, Option

from dfqs_nb import core, gguf, ladder
from dfqs_nb import merge as merging
from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError, HeaderError, ShardError, SpaceError
from dfqs_nb.core.files import check_output
from dfqs_nb.gguf import facts, models
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.workbook.terminal import FILES, Overwrite, app, say, say_table

OUTLOOK_N_CTX = 4096  # tokens, for the memory of a model that is not here
MACHINES = ["64GiB", "96GiB", "128GiB"]
NO_CARDS = "graphics cards not counted; --vram 24GiB counts one"
RAM, GPU, DISK = "RAM", "GPU", "disk"
SIZES = ["dense", "routed experts", "cache", "compute", "left", "read a token"]  # of what lies on a device
SPLIT = ("split.no", "split.count", "split.tensors.count")  # how a model is cut, not what it is
SHOWN, LISTED = 60, 20  # characters of a value that differs, differences of a kind
Place = Annotated[str, Argument(help="A file, a name of `dfqs-nb models`, hf://..., https://...")]


@app.command(rich_help_panel=FILES)
def inspect(
    paths: list[str] = Argument(..., metavar="FILE...", help="Any file, here or at hf://... or https://..."),
    quick: bool = Option(False, "--quick", help="In milliseconds: do not ask llama.cpp."),
) -> None:
    """Say what a file is, if llama.cpp takes it, and if it fits.

    It changes no file, and reads headers, sizes and names alone, also of an address. That llama.cpp takes a
    file is kept under outputs/ while file and llama.cpp are the same. Exit status 1: a file is neither a
    sound model nor a shard of one.

    Examples: `dfqs-nb inspect model.gguf`, `dfqs-nb inspect hf://owner/repo/model.gguf`
    """
    sound = []
    for path in paths:
        try:
            sound.append(_inspect(path, quick))
        except DfqsError as error:
            if len(paths) == 1:
                raise
            say(f"{error}")
            sound.append(False)
    raise typer.Exit(int(not all(sound)))


def _inspect(path: str, quick: bool) -> bool:
    with models.headers_of(path) as (local, places):
        is_far = bool(places)
        diagnosis = merging.diagnose(local, allow_holes=is_far)
        is_model = diagnosis.sound or diagnosis.kind == "raw concatenation"
        rows = _facts(diagnosis, is_far, quick) if is_model else {}
        say(f"{models.shown(path)}: {diagnosis.kind}\n  {diagnosis.finding}")
        if step := diagnosis.next_step:
            say(f"  -> {f'after the download: {step}'.replace(f'{local.parent}/', '') if is_far else step}")
        for what, value in rows.items():
            say(f"  {what + ':':<28}{format(value, ',') if type(value) is int else value}")
        return diagnosis.sound


def _facts(diagnosis: Any, is_far: bool, quick: bool) -> dict[str, Any]:
    """The whole model's facts, from all its shards when they are there, and (not ``quick``) its outlook."""
    glued, header = not diagnosis.sound, diagnosis.headers[0]
    try:
        shards = diagnosis.shards()
        header, outlook = shards.as_one, {} if quick else _outlook(shards, glued, is_far)
    except ShardError as error:
        outlook = {"the figures above": f"of this shard alone: {error.what}"}
    if glued:
        return outlook
    known = facts.identity(header) | facts.architecture(header)
    rows, experts = {k: value for k, value in known.items() if value != "not stated"}, facts.experts(header)
    if experts.total:
        rows["experts"] = experts.sentence
    for row in facts.class_sizes(header):
        bits = f"{row['bytes']:>16,} bytes {row['bits_per_weight']:7.2f} bits a weight"
        rows[row["class"]] = f"{bits}  {row['types']}"
    return rows | outlook


def _outlook(shards: ShardSet, glued: bool, is_far: bool) -> dict[str, Any]:
    """Whether llama.cpp knows the model of these headers, and what it needs of this machine."""
    from dfqs_nb.llama.check import kept_verdict, loader_verdict

    def ask() -> Any:
        with models.outline(shards.paths[0]) if glued else nullcontext(shards) as laid_out:
            return loader_verdict(laid_out.paths[0])

    verdict = (ask() if is_far else kept_verdict(dict.fromkeys(shards.paths), ask)).sentence
    verdict += ", once it is repaired" if glued else ""
    try:
        needs = gguf.memory.estimate(shards.as_one, OUTLOOK_N_CTX)
        fits = gguf.memory.check_fits(needs) or "fits, weights and all"
    except (HeaderError, SpaceError) as error:
        fits = error.what
    fits += " (graphics cards not counted; `dfqs-nb plan MODEL` counts them)"
    return {"llama.cpp": verdict, f"memory, {OUTLOOK_N_CTX:,} tokens": fits}


@app.command(rich_help_panel=FILES)
def merge(
    paths: list[str] = Argument(..., metavar="SHARD...", help="Any shard, or all, or a registered name."),
    output: Path = Option(..., "-o", "--output", help="The merged file."),
    consume: bool = Option(False, "--consume", help="DELETES the shards on the way; needs 64 MiB of disk."),
    overwrite: Overwrite = False,
) -> None:
    """Merge shards into one proven file.

    Resumes after a kill. Example: `dfqs-nb merge model-00001-of-00002.gguf -o model.gguf`
    """
    _say_made(merging.merge_model(paths, output, overwrite=overwrite, consume=consume))


def _say_made(result: Any) -> None:
    say(f"{result.path}: {result.nbytes:,} bytes, read back equal, in {result.seconds:,.1f} s")
    say(f"SHA-256 {result.sha256}")


@app.command(rich_help_panel=FILES)
def repair(
    path: str = Argument(..., metavar="FILE", help="The glued file."),
    output: str = Option("", "-o", "--output", help="The sound file."),
    in_place: bool = Option(False, "--in-place", help="DELETES FILE, puts the model there; needs 64 MiB."),
    overwrite: Overwrite = False,
) -> None:
    """Repair a file of glued shards: write the model that is in it.

    Example: `dfqs-nb repair DeepSeek-V4-Flash-IQ1_S-XL.gguf --in-place`
    """
    if bool(output) == in_place:
        raise typer.BadParameter("give either -o OUTPUT or --in-place")
    _say_made(merging.repair(path, output or None, in_place=in_place, overwrite=overwrite))


@app.command(rich_help_panel=FILES)
def verify(
    path: str = Argument(..., metavar="FILE", help="The model's file."),
    sha256: str = Option("", help="The expected SHA-256 of the file."),
    against: list[str] = Option([], metavar="SHARD", help="Any shard; or repeat the option for each."),
    write_manifest: bool = Option(False, "--write-manifest", help="Keep the hashes beside FILE, for later."),
) -> None:
    """Compare every tensor with a manifest, a hash, or the shards.

    Example: `dfqs-nb verify model.gguf --against model-00001-of-00002.gguf`
    """
    shards = against[0] if len(against) == 1 else against or None
    result = merging.verify_model(path, sha256=sha256, against=shards, write_manifest=write_manifest)
    say(f"{result.path}: {result.nbytes:,} bytes, {len(result.tensors):,} tensors, SHA-256 {result.sha256}")
    kept = [f"kept in {result.path.name}.manifest.json"] if write_manifest else []
    say(*(f"  {sentence}" for sentence in (*result.meaning, *kept)))
    raise typer.Exit(int(not result.diagnosis.sound))


@app.command(rich_help_panel=FILES)
def quantize(
    source: str = Argument(..., metavar="MODEL", help="F32, F16 or BF16: a name or a file."),
    recipe: str = Argument(..., help="A name in data/quantize/, or a .toml file."),
    output: str = Option("", "-o", "--output", help="Required unless --dry-run."),
    imatrix: str = Option("", metavar="FILE", help="An importance matrix, from llama-imatrix or from us."),
    calibrate: str = Option("", metavar="TEXT", help="Collect one over this text or prompt set; it is kept."),
    dry_run: bool = Option(False, "--dry-run", help="List types and exact sizes; write nothing."),
    overwrite: Overwrite = False,
) -> None:
    """Quantize a model by a recipe, with llama.cpp's own quantizer.

    Example: `dfqs-nb quantize dfqs-nano-f16 iq1_s-xl -o small.gguf --calibrate calibration-nano`
    """
    from dfqs_nb.ladder.imatrix import collect, read_imatrix
    from dfqs_nb.ladder.quantizer import load_recipe

    shards, chosen = open_shards(models.resolve(source)[0]), load_recipe(recipe)
    if not (output or dry_run):
        raise DfqsError("no output was named", hint="pass -o FILE, or --dry-run to see what it would be")
    if imatrix and calibrate:
        raise typer.BadParameter("give either --imatrix or --calibrate")
    if not dry_run:  # calibration takes its time
        check_output(Path(output), shards.paths, overwrite)
    with TemporaryDirectory() as folder:
        matrix = read_imatrix(imatrix) if imatrix else None
        if calibrate and chosen.weights:
            kept = f"{folder}/imatrix.gguf" if dry_run else f"{output}.imatrix.gguf"
            matrix = collect(shards, calibrate, kept, overwrite=overwrite)
        if dry_run:
            plan = ladder.plan(shards, chosen, matrix)
        else:
            plan = ladder.quantize(shards, chosen, output, imatrix=matrix, overwrite=overwrite)
    say_table(plan.by_class(), ".2f")
    total = f"{plan.nbytes:,} bytes of tensors, {plan.bits_per_weight:.2f} bits a weight"
    say(f"would be {total}" if dry_run else f"{output}: {total}")


@app.command(rich_help_panel=FILES)
def plan(
    model: Place,
    ram: str = Option("", metavar="64GiB,96GiB", help="Memory; the first is planned. Default: what is free."),
    vram: str = Option("", metavar="24GiB,24GiB", help="Memory of each card; 0: none. Default: the same."),
    context: int = Option(8192, min=1, metavar="TOKENS", help="Length of the context."),
    ram_gbs: float = Option(0.0, min=0, metavar="GB/S", help="Bandwidth of memory. 0: measured here."),
    gpu_gbs: float = Option(0.0, min=0, metavar="GB/S", help="Bandwidth of a card's memory. 0: unknown."),
    disk_gbs: float = Option(0.0, min=0, metavar="GB/S", help="Bandwidth of MODEL's disk. 0: measured here."),
) -> None:
    """Plan where a model's tensors would lie, and how fast it can be.

    It prints the llama-server command. Only headers are downloaded. Memory is sold in GiB: 64GB means 64 GiB.
    Examples: `dfqs-nb plan model.gguf`,
    `dfqs-nb plan hf://owner/repo/model.gguf --ram 64GiB --vram 24GiB,24GiB --context 32768`
    """
    import pandas as pd

    from dfqs_nb.core.machine import available_memory, gpu_memories
    from dfqs_nb.llama.timing import forecast

    if not (vram or ram) and platform.system() != "Darwin":  # whose GPU has no memory of its own
        vram = ",".join(f"{free >> 20}MiB" for free in gpu_memories())
    cards, machines = ([text for text in sizes.split(",") if text.strip(" 0")] for sizes in (vram, ram))
    vram_bytes, rams = (list(map(gguf.memory.size_of, texts)) for texts in (cards, machines))
    rams = rams or [available_memory().available_bytes]
    with models.outline(model) as known:
        header, far = known.as_one, bool(known.places)
        shape = gguf.memory.Sizes(header)
        if shape.n_context and context > shape.n_context:
            what = f"a context of {context:,} tokens; the model was made for {shape.n_context:,}"
            raise DfqsError(what, where=models.shown(model), hint=f"give --context {shape.n_context} or less")
        say(f"{models.shown(model)}: {size(known.nbytes)}, {header.architecture}")
        if not machines and known.nbytes > rams[0]:
            machines, rams = MACHINES, rams + list(map(gguf.memory.size_of, MACHINES))
        buffers = _runtime_rows(known, context, rams, vram_bytes)
        placed = gguf.memory.place(shape, context, rams[0], vram_bytes, **buffers)
        outlook = None
        if placed.works and placed.disk_token_bytes and not (far or known.glued or cards):
            room = placed.ram.capacity_bytes - placed.ram.cache_bytes - (placed.ram.compute_bytes or 0)
            given = (1e9 * disk_gbs, "as given") if disk_gbs else ()
            outlook = forecast(known.headers, room - shape.dense[-1], *given)  # the embedding lies there, too
        known_speeds = {RAM: 1e9 * ram_gbs or core.memory_bandwidth(), GPU: 1e9 * gpu_gbs}
        known_speeds[DISK] = 1e9 * disk_gbs or (outlook and outlook.speed) or 0.0
        speeds = {name: speed for name, speed in known_speeds.items() if speed}
        sizes = [["unknown" if n is None else size(n) for n in device[2:]] for device in placed.devices]
        names = pd.Index([device.name for device in placed.devices], name="device")
        say(f"\n{pd.DataFrame(sizes, names, SIZES).to_string()}\n")
        if note := gguf.memory.kv_cache_bytes(header, context).note:
            say(f"the cache is an estimate: {note}")
        note = "a longer context leaves fewer layers on cards" if cards else NO_CARDS
        note += "" if buffers else "; llama.cpp's compute buffer not counted"
        first, *more = gguf.memory.context_limits(shape, context, rams[0], vram_bytes, **buffers)
        say(f"{first} ({note})", *more)
        say(*_advice(placed, speeds, outlook))
        if placed.works:
            name = known.paths[0].name if far else str(known.paths[0])
            if known.glued:  # `repair --in-place` keeps the name, which the laid-out copies do not have
                name = next(iter(known.places)).name if far else model
            words = ["llama-server", "-m", name, "-c", str(context), *placed.flags, "-np", "1"]
            say(f"\n{shlex.join(words)}")
        if len(machines) > 1:
            names = ["+".join([text, *cards]) for text in machines]
            table = gguf.memory.machines_table(shape, context, names, speeds, **buffers)
            say(f"\n{table.drop(columns='flags').to_string(float_format='{:.2f}'.format)}")


def _runtime_rows(known: Any, n_ctx: int, rams: list[int], cards: list[int]) -> dict[str, Any]:
    """Say whether llama.cpp knows the model; `compute_buffers`, where it plans them."""
    from dfqs_nb.llama.check import compute_buffers, loader_verdict

    if known.glued:
        when = "after the download, " if known.places else ""
        say(f"  its shards are glued together: {when}dfqs-nb repair makes one model of them")
    verdict = loader_verdict(known.paths[0])
    say(f"  {verdict.sentence}")
    buffers, reason = compute_buffers(known, n_ctx, rams, cards) if verdict.accepted else ({}, "")
    if reason:
        say(f"  its compute buffer is not known: {reason}")
    return buffers


def _advice(placed: Any, speeds: dict[str, float], outlook: Any) -> list[str]:
    if not placed.works:
        return ["memory does not hold the cache and the compute buffer: lower --context"]
    lines = [f"  {name}: {text}" for name, text in outlook.rows.items()] if outlook else []
    bound, unknown = placed.bound(speeds)
    if bound:
        stated = ", ".join(f"{name} {value / 1e9:.3g} GB/s" for name, value in speeds.items())
        lines.append(f"at most {bound:.2f} tokens/s by reading weights alone ({stated})")
    elif unknown:
        options = " and ".join(f"--{name.lower()}-gbs" for name in unknown)
        lines.append(f"no bound on speed: {', '.join(unknown)} not measured; give {options}, in GB/s")
    if placed.disk_token_bytes:
        command = (outlook.disk.command if outlook else "") or "blockdev --setra 256 DEVICE"
        least = size(placed.disk_token_bytes)
        lines.append(f"memory does not hold all weights: a token reads at least {least} from the disk")
        lines.append("opened here, the paging help keeps it at that; for llama-server leave mlock off,")
        lines.append(f"and lower n_ubatch and read-ahead ({command} as root)")
    if placed.devices[1:] and placed.devices[0].compute_bytes is None:
        lines.append("a card's compute buffer is unknown: 2 GiB of each card are left for it and the driver")
        lines.append("there, llama-server also places without these flags (--fit), and plans that buffer")
        lines.append("a context above 262,144 tokens, or one without -fa on, can need more")
    return lines


@app.command(rich_help_panel=FILES)
def diff(
    a: Place,
    b: str = Argument(..., help="The model to compare with."),
    data: bool = Option(False, "--data", help="Also compare the tensors' bytes, which reads all of them."),
    full: bool = Option(False, "--all", help=f"List every difference, not the first {LISTED} of a kind."),
) -> None:
    """Compare two models: metadata, tensors, types, shapes, bytes.

    Exit status 1: they differ. Example: `dfqs-nb diff model-Q8_0.gguf hf://owner/repo/model-Q4_0.gguf`
    """
    with models.outline(a) as left, models.outline(b) as right:
        differences, sentence = compare(left, right, data=data)
    for kind, lines in differences.items():
        listed = lines if full else lines[:LISTED]
        say(f"{kind}: {len(lines):,}", *(f"  {line}" for line in listed))
        if more := len(lines) - len(listed):
            say(f"  and {more:,} more, which --all lists")
    say(sentence)
    raise typer.Exit(int(bool(differences)))


def compare(a: models.Outline, b: models.Outline, *, data: bool = False) -> tuple[dict[str, list[str]], str]:
    """What differs between two models, line by line by its kind, and a sentence on what was compared.

    ``data``: also hash the tensors of equal type and shape. This reads a remote model without storing it.
    """
    for model in (a, b) if data else ():  # before hours of reading the other model
        if model.glued:
            what, hint = "the bytes of glued shards are not compared", "download and repair it first"
            hint = hint if model.places else "repair it first: `dfqs-nb repair FILE --in-place`"
            raise DfqsError(what, where=models.shown(model.model), hint=hint)
    first, second = a.headers[0], b.headers[0]
    left, right = ({t.name: f"{t.type} {' x '.join(map(str, t.shape))}" for t in it.tensors} for it in (a, b))
    both = [name for name in left if name in right]
    alike = {name for name in both if left[name] == right[name]}
    fields = [name for name in {**first.fields, **second.fields} if name not in SPLIT]
    lines = {
        "only in the first": [f"{name}: {left[name]}" for name in left if name not in right],
        "only in the second": [f"{name}: {right[name]}" for name in right if name not in left],
        "other type or shape": [f"{it}: {left[it]} | {right[it]}" for it in both if it not in alike],
        "metadata": [line for name in fields if (line := _field(name, first, second))],
    }
    if data:
        hashes, others = a.tensor_hashes(alike), b.tensor_hashes(alike)
        lines["other bytes"] = sorted(name for name in alike if hashes[name] != others[name])
    lines = {kind: rows for kind, rows in lines.items() if rows}
    scope = f"{len(fields):,} metadata fields and {len(left | right):,} tensors"
    looked = f"bytes of {len(alike):,} tensors compared" if data else "bytes not compared (--data does)"
    return lines, f"{'different' if lines else 'equal'}: {scope}; {looked}"


def _field(name: str, *headers: GGUFHeader) -> str:
    """The line for a field that differs; else an empty text."""
    own = [(header, header.fields.get(name)) for header in headers]
    texts = [f"{field.type} {header[name]!r}" if field else "missing" for header, field in own]
    if texts[0] == texts[1]:
        return ""
    # of long texts and lists, the place where they begin to differ
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    parts = [(text[start : start + SHOWN], len(text) > start + SHOWN) for text in texts]
    return f"{name}: " + " | ".join(f"{'…' * (start > 0)}{part}{'…' * more}" for part, more in parts)
