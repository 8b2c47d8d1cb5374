"""Commands about the real size: where a model fits, how two models differ, a specimen to rehearse with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer import Argument, Option

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import tilde
from dfqs_nb.workbook.app import FILES, QUIET, app, say

PLACE = Argument(..., help="A file, a name of `dfqs-nb models`, hf://..., https://...")
MACHINES = ("64GB", "96GB", "128GB")
RAM, GPU, DISK = "RAM", "GPU", "disk"


@app.command(rich_help_panel=FILES)
def plan(
    model: str = PLACE,
    ram: str = Option("", metavar="64GB", help="Size of memory. Default: the free memory here."),
    vram: str = Option("", metavar="24GB,24GB", help="Memory of each graphics card."),
    context: int = Option(8192, min=1, metavar="TOKENS", help="Length of the context."),
    ram_gbs: float = Option(0.0, min=0, metavar="GB/S", help="Bandwidth of memory. 0: measured here."),
    gpu_gbs: float = Option(0.0, min=0, metavar="GB/S", help="Bandwidth of a card's memory. 0: unknown."),
    disk_gbs: float = Option(0.0, min=0, metavar="GB/S", help="Bandwidth of the disk. 0: measured here."),
    profile: str = Option("", metavar="FILE", help="routing_profile.json of `dfqs-nb routing MODEL`."),
) -> None:
    """Plan where a model's tensors and cache would lie, with the llama-server command and a bound on speed.

    Only headers are downloaded. Examples: `dfqs-nb plan model.gguf`,
    `dfqs-nb plan hf://owner/repo/model.gguf --ram 64GB --vram 24GB,24GB --context 32768`
    """
    from dfqs_nb.core.machine import available_memory
    from dfqs_nb.gguf import placement, remote
    from dfqs_nb.llama.diagnosis import forecast
    from dfqs_nb.routing.placement import read_profile

    cards = [placement.size_of(text) for text in vram.split(",") if text.strip()]
    memory = placement.size_of(ram) if ram else available_memory().available_bytes
    with remote.outline(model) as known:
        reads, about = read_profile(profile, known.shards.headers) if profile else ({}, "")
        shape = placement.Model(known.shards.as_one, reads)
        if shape.n_context and context > shape.n_context:
            what = f"a context of {context:,} tokens; the model was made for {shape.n_context:,}"
            raise DfqsError(what, where=remote.shown(model), hint=f"give --context {shape.n_context} or less")
        say(f"{remote.shown(model)}: {size(known.shards.nbytes)}, {known.shards.as_one.architecture}")
        compute, far = _runtime_rows(known, context), known.copy is not None
        placed = placement.place(shape, context, memory, cards, compute_bytes=compute)
        paged = not (far or known.glued or cards) and placed.disk_token_bytes
        room = placed.ram.capacity_bytes - placed.ram.cache_bytes - (placed.ram.compute_bytes or 0)
        outlook = forecast(known.shards.headers, room, helped=placed.disk_token_bytes) if paged else None
        speeds = _speeds(placed, outlook, {RAM: ram_gbs, GPU: gpu_gbs, DISK: disk_gbs})
        name = known.path.name if far else tilde(known.path)
        if known.glued:  # `repair --in-place` keeps the name, which the laid-out copies do not have
            name = remote.places_of(model)[0].name if far else model
        say(f"\n{placement.table(placed).to_string()}\n")
        for name_of, text in outlook.rows.items() if outlook else ():
            say(f"  {name_of}: {text}")
        largest = placement.largest_context(shape, memory, cards, compute_bytes=compute)
        for line in _advice(placed, largest, speeds, outlook):
            say(line)
        if about:
            say(f"experts' use: {about}. The page cache is assumed to keep those that it reads most")
        if cards:
            say("a card's compute buffer was not measured, and 1 GiB of each is left for it. On the machine")
            say("itself llama-server places without these flags too (--fit), and measures that buffer")
        say(f"\n{placed.command(name)}")
        if not ram and not cards:
            table = placement.machines_table(shape, context, MACHINES, speeds, compute_bytes=compute)
            say(f"\n{table.drop(columns=['on cards', 'flags']).to_string(float_format='{:.2f}'.format)}")


def _runtime_rows(known: Any, n_ctx: int) -> int | None:
    """Say whether llama.cpp knows the model; its plan of the compute buffer on a CPU, where it gives one."""
    from dfqs_nb.core.errors import ModelError
    from dfqs_nb.llama import OpenSettings
    from dfqs_nb.llama.check import loader_verdict, plan_memory

    if known.glued:
        when = "after the download, " if known.copy else ""
        say(f"  its shards are glued together: {when}dfqs-nb repair makes one model of them")
    if known.copy:
        say(f"  read over the network: {known.copy.fetched_bytes:,} bytes of headers")
    verdict = loader_verdict(known.path)
    say(f"  {verdict.explain(known.shards.as_one)}")
    if not verdict.accepted:
        return None
    try:
        return plan_memory(known.path, [OpenSettings(n_ctx=n_ctx)])[0]["compute_bytes"]
    except ModelError as error:
        say(f"  its compute buffer is not known: {error.what}")
        return None


def _speeds(placed: Any, outlook: Any, given: dict[str, float]) -> dict[str, float]:
    """Bytes a second by device, as given or measured here; what is neither is left out."""
    from dfqs_nb.core.paths import outputs_dir
    from dfqs_nb.scores import speed

    speeds = {name: 1e9 * value for name, value in given.items() if value}
    speeds.setdefault(RAM, speed.memory_bandwidth())
    if DISK not in speeds and placed.disk_token_bytes:
        outputs_dir().mkdir(parents=True, exist_ok=True)
        measured = (outlook and outlook.disk.pieces) or speed.disk_bandwidth(outputs_dir())
        speeds |= {DISK: measured} if measured else {}
    return speeds


def _advice(placed: Any, largest: int, speeds: dict[str, float], outlook: Any) -> list[str]:
    lines = [f"largest context: {largest:,} tokens" if largest else "no context fits"]
    bound = placed.tokens_per_sec(speeds)
    stated = ", ".join(f"{name} {value / 1e9:.3g} GB/s" for name, value in speeds.items())
    if bound:
        lines.append(f"at most {bound:.2f} tokens/s by reading weights alone ({stated})")
    elif unknown := dict.fromkeys(name.split()[0] for name in placed.unknown_speeds(speeds)):
        options = " and ".join(f"--{name.lower()}-gbs" for name in unknown)
        lines.append(f"no bound on speed: {', '.join(unknown)} not measured; give {options}, in GB/s")
    if not placed.works:
        lines.append("memory does not hold the cache and the compute buffer: lower --context")
    elif placed.disk_token_bytes:
        command = (outlook.disk.command if outlook else "") or "blockdev --setra 256 DEVICE"
        lines += [
            f"memory does not hold all weights: a token reads {size(placed.disk_token_bytes)} or more",
            "opened here, the paging help keeps it at that",
            f"for llama-server leave mlock off, and lower n_ubatch and read-ahead ({command} as root)",
        ]
    return lines


@app.command(rich_help_panel=FILES)
def diff(
    a: str = PLACE,
    b: str = Argument(..., help="The model to compare with."),
    data: bool = Option(
        False, "--data", help="Also compare the tensors' bytes; a remote model is read whole."
    ),
    most: int = Option(20, min=0, help="The most lines for each kind of difference."),
) -> None:
    """Compare two models: metadata keys, tensors, types, shapes, and with --data their bytes.

    Exit status 1: they differ. Example: `dfqs-nb diff model-Q8_0.gguf hf://owner/repo/model-Q4_0.gguf`
    """
    from dfqs_nb.gguf import diff as compare
    from dfqs_nb.gguf import remote

    with remote.outline(a) as left, remote.outline(b) as right:
        difference = compare.compare(left, right, data=data)
    for kind, lines in difference.lines.items():
        say(f"{kind}: {len(lines):,}")
        for line in lines[:most]:
            say(f"  {line}")
        if len(lines) > most:
            say(f"  ... and {len(lines) - most:,} more (--most {len(lines)})")
    say(difference.sentence)
    raise typer.Exit(int(not difference.equal))


@app.command(rich_help_panel=FILES)
def specimen(
    output: Path = Argument(..., metavar="OUT", help="The file to write."),
    full_size: bool = Option(False, "--full-size", help="All experts and tokens: 62.7 GB for all layers."),
    layers: int = Option(0, help="Default: 8, and with --full-size all 43."),
    concatenated: bool = Option(
        False, "--concatenated", help="As two glued shards, like the published file."
    ),
    quiet: bool = QUIET,
) -> None:
    """Write a model of the published shape with random weights, to rehearse the real size.

    The same command writes the same bytes. Examples: `dfqs-nb specimen small.gguf`,
    `dfqs-nb specimen flash.gguf --full-size --concatenated`
    """
    from dfqs_nb.gguf.specimen import SMALL_LAYERS, Shape, write_specimen

    shape = Shape.full(layers or None) if full_size else Shape(n_layers=layers or SMALL_LAYERS)
    path = write_specimen(output, shape, concatenated=concatenated, progress=not quiet)
    say(f"{path}: {path.stat().st_size:,} bytes, {shape.n_layers} layers, {shape.n_experts} experts")
