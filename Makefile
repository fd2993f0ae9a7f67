# Every target does its own set-up: Python 3.11, pip and make are enough to run any of them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := curate,flows,dask,postgres,s3,synthetic,model,dev

.PHONY: help setup docs test test-slow check demo curate start stop constraints clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

test: $(STAMP)  ## run the fast tests on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## run the tests that take minutes: real clips, full-size networks, all examples of each property
	UNISH_TEST_EXAMPLES=all $(BIN)/python -m pytest -m "slow or hypothesis or many_examples"

check: $(STAMP)  ## run ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## generate docs/failures.md and docs/settings.md from the code
	$(BIN)/python docs/generate.py

demo: $(STAMP)  ## run the whole pipeline on the embedded world; needs no network, GPU or weights
	$(BIN)/python -m flows.demo demo

# make curate MANIFEST=my.csv OUT=data [ARGS='--param teacher=none ...']
curate: $(STAMP)  ## curate a manifest with Prefect: MANIFEST=... OUT=... [ARGS=...]
	@test -n "$(MANIFEST)" -a -n "$(OUT)" || { echo "usage: make curate MANIFEST=my.csv OUT=data [ARGS='--param teacher=none']"; exit 2; }
	$(BIN)/python -m flows.service start
	$(BIN)/prefect deployment run curate --watch \
		--param manifest="$(abspath $(MANIFEST))" --param out="$(abspath $(OUT))" $(ARGS)
	$(BIN)/curation status --out "$(abspath $(OUT))"

start: $(STAMP)  ## start the Prefect server and serve this checkout's deployments
	$(BIN)/python -m flows.service start

stop: $(STAMP)  ## stop the Prefect server and the deployments
	$(BIN)/python -m flows.service stop

constraints:  ## resolve the versions in constraints.txt again (needs uv)
	uv pip compile --universal --python-version 3.11 --all-extras --no-header --no-annotate --no-emit-index-url \
		--quiet pyproject.toml -o constraints.txt

clean:  ## remove the environment and the tools' caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
