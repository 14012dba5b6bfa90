# make demo [DATA=folder]   the whole pipeline at a small size: outputs/demo/report.html and metrics.json
# make test                 all tests
# make lint                 ruff
# Each sets up .venv by itself; it is reused as long as requirements.txt and the interpreter stay as they are.
# Other variables: PYTHON (the interpreter for .venv), PIP_ARGS (for example an index of your own), ARGS (for `make demo`: keys
# of configs/demo_config.yaml, as in ARGS="output_dir=outputs/other"; for `make test`: pytest's options).

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
DATA ?=
VENV := .venv
BIN := $(VENV)/bin

# Where it is set, every start of a script would compile torch again: below, packages are compiled when they are first used.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint venv
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The copy of requirements.txt inside .venv is written last, so an installation that was interrupted is done again.
venv:
	@if ! cmp -s requirements.txt $(VENV)/requirements.txt || ! $(BIN)/python -c ""; then \
		set -e; start=$$(date +%s); \
		rm -f $(VENV)/requirements.txt; \
		$(PYTHON) -c 'import sys; v = sys.version_info; assert v >= (3, 10), f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}; say PYTHON=python3.12, or what you have"'; \
		echo "Setting up $(VENV) (two minutes on a good connection) ..."; \
		$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV); \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -r requirements.txt; \
		$(BIN)/python -c "import main, train_autoencoder, sample, align, encode, evaluate, recognition.train, recognition.test"; \
		echo $$(($$(date +%s) - start)) > $(VENV)/install_seconds; \
		cp requirements.txt $(VENV)/requirements.txt; \
	fi

demo: venv
	@$(BIN)/python -m demo $(if $(DATA),"data='$(DATA)'") $(ARGS)

test: venv
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
