"""Answer one prompt with llama-cpp-python, greedily: python chat.py "your question"."""

import sys

import llama_cpp.llama_cpp as api
from llama_cpp import Llama

MODEL = {{ model }}
default_params = api.llama_model_default_params


def without_repacking():
    """llama.cpp's defaults, less the repacked copy of the weights: it crashes on CPUs with AMX."""
    params = default_params()
    params.use_extra_bufts = False
    return params


api.llama_model_default_params = without_repacking
llama = Llama(MODEL, n_ctx={{ n_ctx }}, n_threads={{ n_threads }}, n_gpu_layers={{ n_gpu_layers }},
              swa_full=False, {% if "-fa" in flags %}flash_attn=True, {% endif %}seed=42, verbose=False)
messages = [{"role": "user", "content": " ".join(sys.argv[1:]) or {{ prompt }}}]
answer = llama.create_chat_completion(messages, max_tokens=256, temperature=0.0)
print(answer["choices"][0]["message"]["content"])
llama.close()
