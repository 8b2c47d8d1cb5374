"""Serve the model with llama-cpp-python's OpenAI-compatible server, on this machine only: python serve.py [PORT]."""

import os
import sys

import llama_cpp.llama_cpp as api
import uvicorn
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings

HOST, PORT = {{ host }}, int(sys.argv[1]) if len(sys.argv) > 1 else {{ port }}
KEY_VARIABLE = {{ key }}  # of the environment; clients must send its value; empty: no key


def with_field(make, name, value):
    """A maker of default parameters with one field changed: the server has no option for it."""
    def changed():
        params = make()
        setattr(params, name, value)
        return params
    return changed


api.llama_context_default_params = with_field(api.llama_context_default_params, "swa_full", False)
api.llama_model_default_params = with_field(api.llama_model_default_params, "use_extra_bufts", False)
model = ModelSettings(model={{ model }}, model_alias={{ name }}, n_ctx={{ n_ctx }}, n_threads={{ n_threads }},
                      n_gpu_layers={{ n_gpu_layers }}, {% if "-fa" in flags %}flash_attn=True, {% endif %}seed=42, verbose=False)
key = os.environ[KEY_VARIABLE] if KEY_VARIABLE else None
app = create_app(server_settings=ServerSettings(host=HOST, port=PORT, api_key=key), model_settings=[model])
uvicorn.run(app, host=HOST, port=PORT, log_level="warning")
