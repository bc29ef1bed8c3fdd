# make table2     make the environment, then Table 2 on miniature models, then print it
# make test       make the environment, then run all checks and tests (those of SLURM need its packages: docs/cluster.md)
# make test-all   also run the long tests: repeated kills, damage, hostile programs, cluster faults; more than an hour
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do $$name -c '$(FITS)' 2> /dev/null && echo $$name && break; done)
FITS = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
NO_PYTHON = no Python 3.11, 3.12 or 3.13 with venv was found: install one (Debian, Ubuntu: sudo apt-get install python3.11-venv), \
or name one: make PYTHON=/path/to/python3.11
export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false
BIN := .venv/bin
WARM := $(if $(wildcard /proc/driver/nvidia),,$(BIN)/llmfusion warm --)# steps fork from one process, which a GPU's driver does not support

.PHONY: table2 test test-all check unit workflow e2e slurm lock generated clean

table2: .venv/ready
	$(BIN)/llmfusion doctor config/mini.yaml
	$(WARM) $(BIN)/snakemake --profile profiles/mini results/table2.csv
	@cat runs/mini/results/table2.md

test: check unit workflow e2e slurm

test-all: test
	$(BIN)/python -m pytest -m long

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/llmfusion check config/*.yaml config/examples/*.yaml

unit: .venv/ready
	$(BIN)/python -m pytest tests/unit

workflow: .venv/ready
	SLURM_CONF=/dev/null $(BIN)/python -m pytest tests/workflow

e2e: .venv/ready
	$(BIN)/python -m pytest tests/e2e

slurm: .venv/ready
	$(BIN)/python -m pytest tests/slurm

.venv/ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || "$(PYTHON)" -c '$(FITS)' 2> /dev/null || { echo "error: $(NO_PYTHON)" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lock: # pin all dependencies; torch as the plain PyPI version number, which its CPU build satisfies too
	$(BIN)/pip-compile --quiet --all-extras --allow-unsafe --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --no-header --annotation-style=line --output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+cpu /\1     /' requirements.lock

generated: .venv/ready # write what is derived from the code and checked in: config/schema.json, tables in the documents
	$(BIN)/python docs/generate.py

config/mini-seeds.yaml: config/mini.yaml .venv/ready # the study of docs/results.md
	$(BIN)/llmfusion replicate config/mini.yaml $@ --sets 2

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
