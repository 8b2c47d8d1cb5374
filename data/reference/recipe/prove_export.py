"""Compare an exported F32 file in llama.cpp with transformers: ``python prove_export.py RUN MODEL.gguf``.

Needs llama-cpp-python beside torch, or an interpreter that has it, in ``$DFQS_LLAMA_PYTHON``. Prints a report in
JSON; exits with 1 where fewer than 99 % of the likeliest tokens agree, the root mean square difference of the
logits is 2 % of their spread (standard deviation) or more, or a text becomes other tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

N_TOKENS, AGREE, SPREAD = 512, 0.99, 0.02

THEIRS = """
import ctypes, json, sys
import llama_cpp, numpy as np
defaults = llama_cpp.llama_model_default_params
def without_repacking():
    given = defaults()
    given.use_extra_bufts = False
    return given
llama_cpp.llama_cpp.llama_model_default_params = without_repacking
llama_cpp.llama_model_default_params = without_repacking
asked = json.load(open(sys.argv[2]))
n = len(asked["ids"])
model = llama_cpp.Llama(sys.argv[1], n_ctx=max(n, 64), n_batch=n, n_ubatch=n, n_threads=1, n_threads_batch=1,
                        logits_all=True, type_k=0, type_v=0, swa_full=False, verbose=False)
model.eval(asked["ids"])
texts = [model.tokenize(one.encode(), add_bos=False, special=False) for one in asked["texts"]]
np.savez(sys.argv[3], logits=np.array(model.scores[:n]), texts=json.dumps(texts))
"""


def llama_cpp_side(path: Path, ids: list[int], texts: list[str]) -> tuple[np.ndarray, list[list[int]]]:
    """Logits [tokens, vocabulary] and the tokens of each text, from llama.cpp in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "asked.json").write_text(json.dumps({"ids": ids, "texts": texts}))
        python = os.environ.get("DFQS_LLAMA_PYTHON", sys.executable)
        call = [python, "-c", THEIRS, str(path), str(folder / "asked.json"), str(folder / "found.npz")]
        subprocess.run(call, check=True, timeout=600)
        with np.load(folder / "found.npz") as found:
            return found["logits"], json.loads(str(found["texts"]))


def compare(ours: np.ndarray, theirs: np.ndarray, choice: int) -> dict:
    """Agreement of the likeliest token, and differences of logits, with the place of the largest.

    ``choice``: the token from which on the indexer has more entries than it may pick. Where its scores are almost
    equal, as in a model that has learnt nothing yet, rounding decides which entry is left out.
    """
    gap = np.abs(ours - theirs)
    per_token = gap.max(axis=1)
    return {
        "tokens": len(ours),
        "same_likeliest": float((ours.argmax(1) == theirs.argmax(1)).mean()),
        "rms_over_spread": float(np.sqrt((gap**2).mean()) / ours.std()),
        "largest": float(gap.max()),
        "largest_at": int(per_token.argmax()),
        "largest_before_the_indexer_chooses": float(per_token[:choice].max()),
        "median_of_largest_by_token": float(np.median(per_token)),
        "first_above_0.01": int(np.argmax(per_token > 0.01)) if (per_token > 0.01).any() else None,
    }


def main() -> int:
    import torch
    from families import tasks
    from model import RATIOS
    from train import restored

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("path", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    encoder, model = restored(asked.run)
    drawn = list(islice(tasks("proof", lambda: 8, held_out=True), 200))
    ids = [token for task in drawn for token in encoder.encode(task)[0]][:N_TOKENS]
    texts = [text for task in drawn for turn in task.turns for text in turn]
    theirs, their_texts = llama_cpp_side(asked.path, ids, texts)
    with torch.no_grad():
        choice = model.config.index_topk * min(rate for rate in RATIOS if rate)
        report = compare(model(torch.tensor([ids])).logits[0].numpy(), theirs, choice)
    report["texts"], report["same_tokens"] = (
        len(texts),
        sum(map(list.__eq__, their_texts, map(encoder.text, texts))),
    )
    print(json.dumps(report, indent=1))
    good = report["same_likeliest"] >= AGREE and report["rms_over_spread"] < SPREAD
    return 0 if good and report["same_tokens"] == len(texts) else 1


if __name__ == "__main__":
    sys.exit(main())
