"""Small run folders with a report, and the answers that it was made from, for the tests of comparison and ranking."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from dfqs_nb.context import Counts
from dfqs_nb.core.files import canonical_sha256, sha256_of_file
from dfqs_nb.scores import grading as scoring

LENGTHS = (64, 128, 256, 512, 1024)
SETTINGS = {
    "runtime": "llama-cpp-python 0.3.36",
    "system_info": "CPU : AVX2 = 1 |",
    "n_ctx": 1024,
    "n_threads": 1,
    "type_k": "f16",
    "type_v": "f16",
}
CONDITIONS = {
    "scores": {
        **SETTINGS,
        "nano-reasoning": {"prompt_set_sha256": "a" * 64, "chat_template_sha256": "b" * 64, "mode": "chat"},
        "nano-code": {"prompt_set_sha256": "c" * 64, "chat_template_sha256": "none", "mode": "complete"},
    },
    "long_context": {**SETTINGS, "prompt_set": "long-context-nano", "grid": list(LENGTHS), "n_haystacks": 15},
}
MACHINE = {
    "Python": "3.11.7",
    "system": "Linux x86_64",
    "processor": "a processor",
    "usable cores": 2,
    "memory (GiB)": "8.0, 4.0 free",
}

DETAIL = {
    "low": None,
    "high": None,
    "level": 0.95,
    "guess_rate": 0.0,
    "unit": "as it says",
    "withheld": None,
    "source": "scores.json",
}

ENVELOPE = {
    "model": "a model",
    "note": "",
    "rows": [
        {"n_ctx": 8192, "kv_bytes": 1, "compute_bytes": None, "need_bytes": 2}
        | {"fits": {"this machine (8.0 GB)": "fits"}}
    ],
}
CONFORMANCE = [
    {"id": "single-file", "level": "SHALL", "requirement": "The model runs from a single GGUF file."}
    | {"verdict": "met", "evidence": "one file", "notebook": "01_merge_shards.ipynb", "source": "section 3"}
]


def make_run(
    folder: Path,
    model: str,
    *,
    skill: float = 0.0,
    flat: float | None = None,
    seed: int = 1,
    conditions: dict | None = None,
    tier: str = "nano",
    n_code: int = 24,
    contended: bool = False,
    machine: dict | None = None,
    withheld: dict | None = None,
    expected: str = "The pass key is {}.",
    failure: tuple[str, int] | None = None,
    created: str = "2026-05-19",
) -> Path:
    """A run folder with items drawn at random and the report that they give.

    ``skill`` moves the chance of a right answer; ``flat`` is that of every long-context answer.
    """
    folder.mkdir(parents=True)
    scores = _score_items(folder, skill, seed, n_code)
    context = _context_items(folder, skill, flat, seed, expected)
    boundary = Counts.of(context).boundary()
    if failure:
        boundary = boundary.capped(failure[1], failure[0])
    curve = Counts.of(context).curve()
    speed = 100 + 10 * seed + 50 * skill
    details = {score.name: _score_detail(score) for score in scores}
    details["context_stability_curve"] = {
        **DETAIL,
        "value": curve["curve"].tolist(),
        "n": int(curve["n"].sum()),
        "lengths": curve["length"].tolist(),
        "points": curve[["length", "correct", "n", "accuracy", "low", "high"]].to_dict("records"),
        "guess_rate": boundary.guess_rate,
    }
    details["failure_boundary_tokens"] = {
        **DETAIL,
        **boundary.as_dict(),
        "value": boundary.tokens,
        "n": boundary.n_items,
    }
    details["cpu_tokens_per_sec"] = {
        **DETAIL,
        "value": speed,
        "low": 0.9 * speed,
        "high": 1.1 * speed,
        "n": 5,
        "values": [0.9 * speed, 1.1 * speed, *[speed] * 3],
        "depth": 512,
        "contended": contended,
    }
    for metric, why in (withheld or {}).items():
        details[metric] = {**details[metric], "value": None, "low": None, "high": None, "withheld": why}
    digest = hashlib.sha256(f"{model}{seed}".encode()).hexdigest()
    report = {
        "schema": "dfqs-report/1.0",
        "specification": "DFQS 1.0",
        "tier": tier,
        "created": f"{created}T10:00:00+00:00",
        "run": folder.name,
        "command": {"run": folder.name, "model": model, "options": [], "budget_minutes": None},
        "model": {
            "name": model,
            "sha256": digest,
            "size_bytes": 5_752_960,
            "header_fingerprint": digest,
            "architecture": "deepseek4",
            "parameters": 14_880_349,
            "active_parameters": 3_673_949,
            "bits_per_weight": 3.073,
        },
        "metrics": {name: detail["value"] for name, detail in details.items()},
        "details": details,
        "conditions": conditions or CONDITIONS,
        "conditions_sha256": "",
        "items": {
            "reasoning": [{"file": "score_items.csv"}],
            "code": [{"file": "score_items.csv"}],
            "long_context": [{"file": "long_context_items.csv"}],
        },
        "routing": None,
        "conformance": CONFORMANCE,
        "claims": [],
        "hardware_envelope": ENVELOPE,
        "machine": {**MACHINE, **(machine or {})},
        "versions": {},
        "sources": {"score_items.csv": "", "long_context_items.csv": ""},
    }
    (folder / "report.json").write_text(json.dumps(report))
    reseal(folder, rehash=True)
    return folder


def _score_items(folder: Path, skill: float, seed: int, n_code: int) -> list[scoring.Score]:
    draw, rows = np.random.default_rng([seed, 1]), []
    for number in range(40):
        right = bool(draw.random() < 0.5 + skill)
        rows.append(
            {
                "set": "nano-reasoning",
                "id": f"nano-reasoning/{number}",
                "family": f"family {number % 4}",
                "length": "short",
                "guess": 0.25,
                "grade": "correct" if right else "wrong",
                "correct": right,
            }
        )
    for number in range(n_code):
        right = bool(draw.random() < 0.5 + skill)
        rows.append(
            {
                "set": "nano-code",
                "id": f"nano-code/{number}",
                "family": "all",
                "length": "short",
                "guess": 0.0,
                "grade": "passed" if right else "error",
                "correct": right,
            }
        )
    items = pd.DataFrame(rows)
    items.to_csv(folder / "score_items.csv", index=False)
    questions, code = (items[items["set"] == name] for name in ("nano-reasoning", "nano-code"))
    return [
        scoring.score_of("reasoning", questions, "nano-reasoning", 40),
        scoring.score_of("code", code, "nano-code", n_code),
    ]


def _score_detail(score: scoring.Score) -> dict:
    return {
        **DETAIL,
        "value": score.value,
        "n": score.n,
        "low": score.low,
        "high": score.high,
        "guess_rate": score.guess_rate,
        "set": score.set,
    }


def _context_items(folder: Path, skill: float, flat: float | None, seed: int, expected: str) -> pd.DataFrame:
    draw, rows = np.random.default_rng([seed, 2]), []
    for haystack in range(15):
        for length in LENGTHS:
            chance = 0.98 / (1 + (length / (350 * 4**skill)) ** 3) if flat is None else flat
            right = bool(draw.random() < chance)
            rows.append(
                {
                    "haystack": haystack,
                    "length": length,
                    "planned": True,
                    "task": "pass key",
                    "question": "key",
                    "depth": 0.5,
                    "expected": expected.format(haystack),
                    "answer": "",
                    "correct": right,
                    "n_prompt": length - 2,
                    "n_needles": 1,
                    "n_evaluated": length,
                    "seconds": 0.01,
                }
            )
    items = pd.DataFrame(rows)
    items.to_csv(folder / "long_context_items.csv", index=False)
    return items


def reseal(folder: Path, *, rehash: bool = False) -> None:
    """Make the report's own hashes right again; with ``rehash`` those of its items, too."""
    path = folder / "report.json"
    report = json.loads(path.read_text())
    for group in report["items"].values() if rehash else ():
        for item in group:
            item["sha256"] = report["sources"][item["file"]] = sha256_of_file(folder / item["file"])
    report["conditions_sha256"] = canonical_sha256(report["conditions"])
    report.pop("integrity", None)
    report["integrity"] = {"sha256": canonical_sha256(report)}
    path.write_text(json.dumps(report, indent=2))


def append_damaged(journal: Path) -> None:
    """Repeat the first row of a journal without what it holds, as a disk's fault or an editor may leave it."""
    row = json.loads(journal.read_bytes().splitlines()[0])
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: row[name] for name in ("id", "conditions")}) + "\n")
