"""What a saved and restored state moves: the first text of each number, cut at many places, and one question.

    python tests/benchmarks/saved_states.py [--texts 4] [--step 3]

After each cut a question follows the text itself, and then its restored state, by the same calls.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dfqs_nb.context.haystacks import Haystacks, probe_of
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.model import TOLERANCE, check_reuse, open_model
from dfqs_nb.llama.settings import OpenSettings

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"


def main() -> None:
    """Print how many cuts move a logit of any token, and how many the check refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--step", type=int, default=3, help="tokens from one cut to the next")
    given = parser.parse_args()
    checks = []
    with open_model(NANO, OpenSettings(n_ctx=640, n_threads=1), trial=False) as model:
        haystacks = Haystacks(model, probe_of("nano"), 256)
        for number in range(given.texts):
            case = haystacks.case(number, 512)
            for cut in range(41 + number, len(case.body), given.step):
                checks.append(check_reuse(model, case.body[:cut], case.questions[0].prompt))
    moved, tokens = [it for it in checks if it.largest_difference], sum(it.n_tokens for it in checks)
    close, largest = sum(it.n_close for it in checks), max(it.largest_difference for it in checks)
    print(f"{len(moved)} of {len(checks)} cuts of {given.texts} texts move a logit, by up to {largest:.2g};")
    print(
        f"{tokens - close} of {tokens} tokens by more than {TOLERANCE}. Refused: {sum(not it.allowed for it in checks)} cuts"
    )


if __name__ == "__main__":
    main()
