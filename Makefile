# What people and CI run. Every target works inside .venv, which is made from requirements.lock on first use.
# PYTHON is the interpreter that requirements.lock was resolved for.
PYTHON ?= python3.11
BIN := $(CURDIR)/.venv/bin
INSTALLED := .venv/.installed

# DVC starts stages as `python -m stages.NAME`: that has to be this Python.
export PATH := $(BIN):$(PATH)
# MLflow and the tools under it send usage statistics unless told not to.
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: help repro smoke test check ablations readme mlflow

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

repro: $(INSTALLED) ## Run what is out of date, time the models, log to MLflow
	$(BIN)/dvc repro
	$(BIN)/q2t measure
	-$(BIN)/q2t track
	@echo "Report: $(CURDIR)/reports/index.html"

# Deleted files are in both lists, and `uniq -u` drops what is there twice.
smoke: $(INSTALLED) ## Run every stage on a tiny model, in a temporary copy
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	{ git ls-files -coz --exclude-standard; git ls-files -dz; } | sort -z | uniq -zu \
	    | tar -c --null -T - | tar -x -C "$$copy" && \
	cd "$$copy" && export PYTHONPATH="$$copy" && git init -q && \
	$(BIN)/q2t profile smoke && $(BIN)/dvc repro

# Two files at a time, in the order of tests/conftest.py, each on one thread: more threads than cores stall in barriers.
test: $(INSTALLED) ## Run the suite, the smoke pipeline included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED) ## Lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ablations: $(INSTALLED) ## Run controls, methods, seeds and sizes, and put what they come to into reports/ablations
	$(BIN)/q2t ablate

readme: $(INSTALLED) ## Put the committed results into the README's tables
	$(BIN)/python -m q2t.readme

mlflow: $(INSTALLED) ## Open the MLflow UI on 127.0.0.1:5000
	@store=$$($(BIN)/python -c 'from q2t.store import init_store; print(init_store().client.tracking_uri)') && \
	case "$$store" in http*) echo "tracking.uri in params.yaml is a server: open it in a browser"; exit;; esac && \
	$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri "$$store"
