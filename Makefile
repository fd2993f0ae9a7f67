# Every target does its own set-up: on a bare machine with Python 3.11, pip and make, any of them works at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := curate,flows,dask,postgres,s3,synthetic,model,dev

.PHONY: help setup docs test test-slow check demo curate start stop constraints clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

test: $(STAMP)  ## the fast tests, on two cores; says at its end what it left out
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## the tests that take minutes: real clips, full-size networks, properties on all their examples
	UNISH_TEST_EXAMPLES=all $(BIN)/python -m pytest -m "slow or hypothesis or many_examples"

check: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## write the pages of docs/ that are made from the code
	$(BIN)/python docs/generate.py

demo: $(STAMP)  ## the whole job on an embedded world: no network, GPU or weights needed
	$(BIN)/python -m flows.demo demo

# make curate MANIFEST=my.csv OUT=data [ARGS='--param teacher=none ...']
curate: $(STAMP)  ## run a manifest through Prefect: MANIFEST=... OUT=... [ARGS=...]
	@test -n "$(MANIFEST)" -a -n "$(OUT)" || { echo "usage: make curate MANIFEST=my.csv OUT=data [ARGS='--param teacher=none']"; exit 2; }
	$(BIN)/python -m flows.service start
	$(BIN)/prefect deployment run curate --watch \
		--param manifest="$(abspath $(MANIFEST))" --param out="$(abspath $(OUT))" $(ARGS)
	$(BIN)/curation status --out "$(abspath $(OUT))"

start: $(STAMP)  ## start the Prefect server and serve the deployments of this checkout
	$(BIN)/python -m flows.service start

stop: $(STAMP)  ## stop them
	$(BIN)/python -m flows.service stop

constraints:  ## resolve constraints.txt anew (needs uv); writes no address
	uv pip compile --universal --python-version 3.11 --all-extras --no-header --no-annotate --no-emit-index-url \
		--quiet pyproject.toml -o constraints.txt

clean:  ## remove the environment and what the tools leave behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
