{% set drive = "/content/drive" if "drive" in target.place else "" %}
# %% [markdown]
# # Ask {{ name }} on {{ target.title }}
#
# Written by `dfqs-nb deploy`. Run all cells. The installation compiles llama.cpp and takes minutes.

# %%
%pip install -q llama-cpp-python==0.3.36

# %%
import os
import shutil

{% if drive %}
from google.colab import drive  # mounted at {{ drive }}

{% endif %}
MODEL = {{ model }}
NBYTES = {{ source.nbytes }}
N_CTX = {{ n_ctx }}

{% if get %}
# %% [markdown]
# Fetch the file. The disk must hold it.

# %%
os.makedirs(os.path.dirname(MODEL), exist_ok=True)
free = shutil.disk_usage(os.path.dirname(MODEL)).free
assert os.path.exists(MODEL) or free > NBYTES, f"{NBYTES:,} bytes needed, {free:,} free"
commands = {{ get }}
for command in commands:
    assert os.system(command) == 0, command

{% endif %}
# %% [markdown]
# Open it. {% if drive %}A file of your Drive appears once it is mounted.{% else %}A local file goes up as a dataset first, and appears under /kaggle/input.{% endif %}

# %%
{% if drive %}
if MODEL.startswith({{ drive }}):
    drive.mount({{ drive }})
{% endif %}
assert os.path.exists(MODEL), f"put the file (and its other shards) at {MODEL}"
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
if NBYTES > memory:
    print(f"{NBYTES:,} bytes of weights, {memory:,} of memory: expect seconds or minutes a token")

# %%
import llama_cpp.llama_cpp as api
from llama_cpp import Llama

make = api.llama_model_default_params


def without_repacking():
    params = make()
    params.use_extra_bufts = False
    return params


api.llama_model_default_params = without_repacking
llama = Llama(MODEL, n_ctx=N_CTX, n_gpu_layers={{ n_gpu_layers }}, swa_full=False, seed=42, verbose=False)

# %%
messages = [{"role": "user", "content": {{ prompt }}}]
answer = llama.create_chat_completion(messages, max_tokens=256, temperature=0.0)
print(answer["choices"][0]["message"]["content"])
