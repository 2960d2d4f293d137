# Each target sets up what it needs; all of them work in a fresh clone and twice in a row.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo demo-clean test test-slow test-gpu lint
help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

demo: .venv/ready  ## train on the embedded digits (minutes on two cores), then evaluate
	$(BIN)/cspnet-train --recipe digits --output runs/demo --resume
	$(BIN)/cspnet-eval --checkpoint runs/demo/checkpoints/best.pt --data digits

demo-clean:  ## forget the demo's run, so that the next `make demo` trains again
	rm -rf runs/demo

lint: .venv/ready  ## ruff: style and imports
	$(BIN)/ruff check .

test: lint  ## lint and the whole suite without a GPU
	$(BIN)/python -m pytest

test-slow: .venv/ready  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/ready  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu
