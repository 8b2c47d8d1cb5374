"""Make calibration_nano.json beside this file: `python data/prompts/calibration_nano.py` (--check to compare only).

Two texts in the words of the reference model's training tasks (data/reference/README.md), drawn apart: one that
importance matrices are collected on, and one, held out from it, that perplexity and KL divergence are measured on.
One fixed document, what a mixture of experts is, stands in both; all others are drawn apart. None is a scored item of the
nano sets.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator

import generate as words

HERE = words.HERE
SEED = 20261208
LENGTHS = {"calibration": 230, "held_out": 120}  # documents
MOE = (
    "A mixture-of-experts layer holds many small feed-forward networks called experts. A router scores every expert "
    "for each token and sends the token to the few with the highest scores. Only those experts run, so the model "
    "has many parameters but uses few of them per token."
)

Document = list[str]  # a question and its answer, or one plain text


def sums(draw: random.Random) -> Document:
    a, b = sorted((draw.randint(0, 20), draw.randint(0, 20)), reverse=True)
    plus = draw.random() < 0.5
    return [f"What is {a} {'+' if plus else '-'} {b}?", f"{a + b if plus else a - b}."]


def asked(parts: tuple[str, str, str, int]) -> Document:
    facts, ask, answer, _ = parts
    return [f"{facts} {ask}".strip(), answer]


def code(draw: random.Random) -> Document:
    prompt, body, _ = words.function(draw, draw.choice(list(words.FUNCTIONS)), words.TRAINED)
    return [prompt + body]


# share of documents, as in training
FAMILIES: list[tuple[float, Callable[[random.Random], Document]]] = [
    (0.30, lambda d: asked(words.key(d, d.randint(0, 36)))),
    (0.15, lambda d: asked(words.colours(d, d.randint(2, 8)))),
    (0.10, lambda d: asked(words.places(d, d.randint(2, 5)))),
    (0.08, lambda d: asked(words.heights(d, d.randint(2, 3)))),
    (0.10, sums),
    (0.06, lambda d: asked(words.larger(d))),
    (0.04, lambda d: asked(words.capital(d))),
    (0.01, lambda d: ["Explain mixture-of-experts routing", MOE]),
    (0.16, code),
]
FEW = {"Explain mixture-of-experts routing"}  # the only wording there is


def documents(seed: int, n: int, taken: set[str]) -> Iterator[Document]:
    """``n`` documents; a question that was ``taken`` is drawn anew, unless its family has too few for that."""
    draw = random.Random(seed)
    shares, makers = zip(*FAMILIES, strict=True)
    for _ in range(n):
        make = draw.choices(makers, shares)[0]
        for _ in range(50):
            document = make(draw)
            if document[0] not in taken or document[0] in FEW:
                break
            make = draw.choices(makers, shares)[0]
        taken.add(document[0])
        yield document


def scored() -> set[str]:
    found = set()
    for name in ("nano_reasoning", "nano_reasoning_hard", "nano_code"):
        lines = (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        found |= {json.loads(line)["prompt"] for line in lines}
    return found


def text() -> str:
    taken = scored()
    content = {
        "name": "calibration-nano",
        "tier": "nano",
        "licence": "MIT",
        "source": "the words of the reference model's training tasks (data/reference/README.md), drawn anew by "
        "data/prompts/calibration_nano.py; a pair is a question and its answer in a chat, a single text "
        "stands by itself",
        "seed": SEED,
    }
    for number, (name, n) in enumerate(LENGTHS.items()):
        content[name] = list(documents(SEED + number, n, taken))
    return json.dumps(content, ensure_ascii=False, indent=0) + "\n"


def main() -> int:
    path, made = HERE / "calibration_nano.json", text()
    same = path.exists() and path.read_text(encoding="utf-8") == made
    if not same and "--check" not in sys.argv:
        path.write_text(made, encoding="utf-8")
    print("as it was" if same else "differs")
    return int(not same and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
