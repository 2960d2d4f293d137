# Each target installs what it needs. It works in a fresh clone, and can be repeated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo demo-clean test test-slow test-gpu lint bench bench-gpu
help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

demo: .venv/ready  ## train on the embedded digits (two to four minutes on two cores), evaluate, write a report
	$(BIN)/cspnet-train --recipe digits --output runs/demo --resume
	$(BIN)/cspnet-eval --checkpoint runs/demo/checkpoints/last.pt --data digits
	$(BIN)/cspnet report runs/demo
	@echo "next: open that report; $(BIN)/cspnet status runs/demo; $(BIN)/cspnet --help"

demo-clean:  ## delete the demo run, so that `make demo` trains again
	rm -rf runs/demo

lint: .venv/ready  ## ruff check, ruff format --check and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint and all fast tests, without a GPU (minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/ready  ## the slow tests (minutes each)
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/ready  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: .venv/ready  ## CPU benchmarks, JSON in results/ (minutes; with DATA=ROOT also those with images: hours)
	mkdir -p results
	$(BIN)/python benchmarks/memory.py --json results/memory.json
	$(BIN)/python benchmarks/step.py --json results/step.json
	$(BIN)/python benchmarks/infer.py --json results/infer.json
ifdef DATA
	$(BIN)/python benchmarks/loader.py --data $(DATA) --json results/loader.json
	$(BIN)/python benchmarks/validate.py --data $(DATA) --json results/validate.json
	$(BIN)/python benchmarks/end_to_end.py --data $(DATA) --json results/end_to_end.json
	$(BIN)/python benchmarks/parity.py --data $(DATA) --json results/parity.json
endif

bench-gpu: .venv/ready  ## GPU benchmarks, JSON in results/ (9 minutes with 40 GB or more, else 27; DATA=ROOT)
	$(BIN)/python benchmarks/gpu.py --output results $(if $(DATA),--data $(DATA))
