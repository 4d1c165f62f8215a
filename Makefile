# make         a virtual environment with the native extension built in place
# make demo    from a real model to emotion vectors, printing every figure (MODEL=folder for another model)
# make test    style, types and all tests, as CI runs them (JOBS= processes)
# make bench   the benchmarks on the CPU beside what others use, and a chart of them (QUICK=1 for fewer rounds)
# make reliability  the long versions of the tests of crashes, faults and hostile files, at most an hour (SHARE=0.05 of it)
# make gpu     build, tests and benchmarks on an NVIDIA GPU, with the torch of $(PYTHON) (DRY=1 without one)
# make corpus  the figures of the default corpus

PYTHON ?= python3
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: all demo test check reliability bench gpu corpus clean
all: $(VENV)/.built

$(VENV)/.installed: pyproject.toml constraints.txt .ci/venv
	@PYTHON="$(PYTHON)" .ci/venv $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/*)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@.ci/cubins
	@touch $@

demo: all
	@$(BIN)/emocore demo $(if $(MODEL),--model "$(MODEL)")

test: check
	@$(BIN)/pytest -n $(JOBS) --dist loadfile

check: all
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

reliability: all
	@$(BIN)/pytest tests/reliability --long $(if $(SHARE),--share $(SHARE)) -q -n $(JOBS) --dist load --maxschedchunk 1

bench: all $(VENV)/.peers
	@$(BIN)/emocore bench $(if $(QUICK),--quick --seconds 75,--chart docs/benchmarks)

$(VENV)/.peers: .ci/peers $(VENV)/.installed
	@.ci/peers $(VENV)
	@touch $@

gpu: $(if $(DRY),all)
	@$(PYTHON) .ci/gpu $(if $(DRY),--dry) $(if $(BUDGET),--budget $(BUDGET))

corpus: all
	@$(BIN)/python benchmarks/corpus_report.py

clean:
	rm -rf $(VENV) build emocore/_C*.so *.egg-info
