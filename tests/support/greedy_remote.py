"""Answer greedily on the CPU, then with the layers on RPC servers through ``OpenSettings``, and print both as JSON.

    LLAMA_CPP_LIB_PATH=BUILD_WITH_RPC python tests/greedy_remote.py MODEL HOST:PORT,HOST:PORT

A process of its own: which build of llama.cpp is loaded is decided when ``llama_cpp`` is imported.
"""

from __future__ import annotations

import json
import sys

from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama.settings import LOG, OpenSettings

PROMPTS = ("Tom is tall. Ann is small. Who is tall?", "Write a short story about a dog and a river.")


def answers(path: str, settings: OpenSettings) -> dict:
    with llama_model.open_model(path, settings) as model:
        said = [llama_generate.chat(model, prompt, 48) for prompt in PROMPTS]
        said.append(llama_generate.complete(model, "def add(a, b):\n", 48))
        buffers = [line for line in LOG.tail(500) if "buffer size" in line and "RPC" in line]
        return {
            "tokens": [one.token_ids for one in said],
            "text": [one.text for one in said],
            "buffers": buffers,
            "conditions": model.conditions(),
        }


def main() -> int:
    path, servers = sys.argv[1:]
    here = answers(path, OpenSettings(n_ctx=512, n_threads=1))
    there = answers(path, OpenSettings(n_ctx=512, n_threads=1, n_gpu_layers=-1, rpc_servers=servers))
    try:
        llama_model.open_model(path, OpenSettings(n_ctx=512, n_gpu_layers=-1, rpc_servers="127.0.0.1:1"))
        refused = ""
    except ModelError as error:
        refused = str(error)
    print(json.dumps({"here": here, "there": there, "refused": refused}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
