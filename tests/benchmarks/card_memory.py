"""What llama.cpp plans for a model on this machine's cards, beside ours: weights, cache, compute buffers, `--fit`.

``python tests/benchmarks/card_memory.py MODEL [--vram 24GB 80GB] [--contexts 8192 65536] [--json FILE]``

It reads the header only: llama.cpp lays out the weights and builds its graphs without allocating anything, so it takes
seconds, and a card of any size can be asked about on a larger one. A card of ``--vram`` is the real one with the rest of
its memory left free. ``--program``: a built `llama_fit.cpp`; by default it is compiled against the installed libraries.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from dfqs_nb.gguf.memory import Sizes, kv_cache_bytes, place, size_of
from dfqs_nb.gguf.shards import open_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from llama_fit import ask, replay, words_of

CONTEXTS = (8192, 16384, 32768, 65536, 131072, 262144, 1048576)
FLASH = {"-1": "auto", "0": "off"}
Rows = list[dict[str, Any]]


def all_on_card(program: str, path: Path, contexts: list[int]) -> Rows:
    """Every layer on the card, at each context and batch, with and without flash attention."""
    model = open_shards(path).as_one
    jobs = [(n_ctx, 512, flash) for flash in FLASH for n_ctx in contexts]
    jobs += [(65536, n_ubatch, "-1") for n_ubatch in (128, 2048)]
    words = [f"ngl=99 n_ctx={n_ctx} n_ubatch={n_ubatch} fa={flash}" for n_ctx, n_ubatch, flash in jobs]
    rows = []
    for (n_ctx, n_ubatch, flash), answer in zip(jobs, ask(program, path, words), strict=True):
        row = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "flash attention": FLASH[flash]}
        if "error" in answer:
            rows.append(row | {"error": answer["error"]})
            continue
        card, ram = answer["devices"][0], answer["devices"][-1]
        cache = kv_cache_bytes(model, n_ctx, n_ubatch).total
        row |= {
            "weights on the card": card["model"],
            "weights in RAM": ram["model"] if card is not ram else 0,
        }
        row |= {"cache": card["context"], "more than our formula": card["context"] - cache}
        rows.append(row | {"compute on the card": card["compute"], "compute in RAM": ram["compute"]})
    return rows


def placements(program: str, path: Path, cards: list[int], contexts: list[int], ram: int) -> Rows:
    """Our placement on a card of this size, and what llama.cpp plans for its flags, in bytes."""
    header = open_shards(path).as_one
    asked = [(vram, n_ctx) for vram in cards for n_ctx in contexts]
    placed = [place(Sizes(header), n_ctx, ram, [vram]) for vram, n_ctx in asked]
    words = [f"n_ctx={n_ctx} {words_of(each.flags)}" for (_, n_ctx), each in zip(asked, placed, strict=True)]
    rows = []
    for (vram, n_ctx), ours, answer in zip(asked, placed, ask(program, path, words), strict=True):
        row = {"card": vram, "n_ctx": n_ctx, "flags": " ".join(ours.flags)}
        if "error" in answer or len(answer["devices"]) < 2:
            rows.append(row | {"error": answer.get("error", "no card")})
            continue
        (card, ram_), (ours_card, ours_ram) = answer["devices"], ours.devices
        weights = [device.dense_bytes + device.expert_bytes for device in (ours_card, ours_ram)]
        aligned = replay(header, ours.flags, 1, 128)[0]
        row |= {"weights on the card": card["model"], "ours": weights[0], "ours aligned to 128": aligned}
        row |= {"weights in RAM": ram_["model"], "ours in RAM": weights[1]}
        row |= {"cache on the card": card["context"], "our cache": ours_card.cache_bytes}
        row |= {"compute on the card": card["compute"], "compute in RAM": ram_["compute"]}
        used = card["model"] + card["context"] + card["compute"]
        rows.append(row | {"left of the card": vram - used})
    return rows


def fits(program: str, path: Path, cards: list[int], contexts: list[int], ram: int) -> Rows:
    """What `--fit` chooses on a card of this size, leaving 1 GiB free, beside our placement."""
    header = open_shards(path).as_one
    asked = [(vram, n_ctx) for vram in cards for n_ctx in (0, *contexts)]
    rows = []
    for (vram, n_ctx), answer in zip(
        asked, ask(program, path, [f"fit={vram} n_ctx={n_ctx}" for vram, n_ctx in asked]), strict=True
    ):
        row = {"card": vram, "asked n_ctx": n_ctx or "open"}
        if "error" in answer or len(answer["devices"]) < 2:
            rows.append(row | {"error": answer.get("error", "no card")})
            continue
        card = answer["devices"][0]
        layers = sorted(
            int(number) for pattern, _ in answer["ot"] for number in re.findall(r"blk\\\.(\d+)", pattern)
        )
        row |= {"n_ctx": answer["n_ctx"], "-ngl": answer["ngl"], "layers with experts in RAM": len(layers)}
        ours = place(Sizes(header), answer["n_ctx"], ram, [vram])
        row |= {"ours": len(ours.in_ram), "our flags": " ".join(ours.flags)}
        row |= {"weights on the card": card["model"], "cache": card["context"], "compute": card["compute"]}
        row |= {"ours on the card": ours.devices[0].dense_bytes + ours.devices[0].expert_bytes}
        row |= {
            "layers": layers,
            "first and last": [answer["ot"][0], answer["ot"][-1]] if answer["ot"] else [],
        }
        left = vram - sum(card[part] for part in ("model", "context", "compute"))
        rows.append(row | {"left of the card": left, "status": answer["status"]})
    return rows


def show(title: str, rows: Rows) -> None:
    """A table in Markdown, sizes in MiB; lists are left to the JSON."""
    names = list(
        dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
    )
    print(f"\n### {title}\n\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = [row.get(name, "") for name in names]
        texts = [f"{n / 2**20:,.2f}" if isinstance(n, int) and abs(n) > 2**21 else str(n) for n in cells]
        print("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--program", help="a built llama_fit.cpp")
    parser.add_argument("--vram", nargs="+", default=["24GB", "80GB"])
    parser.add_argument("--ram", default="128GB")
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--json", type=Path, help="write all figures there, in bytes")
    options = parser.parse_args()
    if not options.program:
        from llama_cpp_tools import tool

        options.program = tool("llama-fit")
    cards, ram = [size_of(text) for text in options.vram], size_of(options.ram)
    some = [n_ctx for n_ctx in options.contexts if n_ctx in (8192, 65536, 131072, 1048576)]
    tables: dict[str, Rows] = {}
    for title, rows in (
        ("All layers on the card", lambda: all_on_card(options.program, options.model, options.contexts)),
        ("Our placements", lambda: placements(options.program, options.model, cards, some, ram)),
        ("What --fit chooses", lambda: fits(options.program, options.model, cards, some[:3], ram)),
    ):
        tables[title] = rows()
        show(title, tables[title])
        if options.json:
            options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
