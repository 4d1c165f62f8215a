# make         a virtual environment with the native extension built in place
# make demo    from a real model to emotion vectors, printing every figure (MODEL=folder for another model)
# make test    style, types and all tests, as CI runs them
# make bench   the benchmarks
# make corpus  the figures of the default corpus

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: all demo test check bench corpus clean
all: $(VENV)/.built

$(VENV)/.installed: pyproject.toml constraints.txt .ci/venv
	@PYTHON="$(PYTHON)" .ci/venv $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/*)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: all
	@$(BIN)/emocore demo $(if $(MODEL),--model "$(MODEL)")

test: check
	@$(BIN)/pytest

check: all
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

bench: all
	@$(BIN)/pytest benchmarks --benchmark-only

corpus: all
	@$(BIN)/python benchmarks/corpus_report.py

clean:
	rm -rf $(VENV) build emocore/_C*.so *.egg-info
