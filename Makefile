# make repro: from clone to trained, evaluated checkpoints    make test: the tests
# make check: format, lint, types                             make table: what each stage taught
# make bench: how fast, beside others that do the same work   make test-more: a cluster, a browser

SHELL := /bin/sh
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: repro test test-more check table bench serve-check docs install clean

repro: install
	minimind repro

table:
	@python -m minimind.cli.table

# MINIMIND=<folder of a clone of MiniMind> adds its scripts; BENCH=--short takes minutes, not an hour
bench: install
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	python -m benchmarks.bench $(if $(MINIMIND),--minimind $(MINIMIND)) $(BENCH)

# Whether transformers, our code and llama.cpp, which is compiled here, say the same (FOLDER=exports/...).
serve-check: .venv/llama-cpp
	python -m benchmarks.serve_check $(FOLDER)

.venv/llama-cpp: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama-cpp]'
	touch $@

docs: install
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	mkdocs build --strict

test: install
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadgroup

# Needs more than Python packages, and skips what is not there: Slurm (apt-get install slurm-wlm munge), Chromium.
test-more: install .venv/skypilot
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[browser,tensorboard,swanlab,trackio,remote]'
	OMP_NUM_THREADS=1 python -m pytest -rs tests/cluster tests/browser tests/test_trackers.py tests/test_remote.py

.venv/skypilot: # in an environment of its own: it asks for other versions of much that we use
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check skypilot==0.14.1 || rm -r $@

check: install
	ruff format --check .
	ruff check .
	lint-imports --no-cache
	mypy

install: .venv/installed

# Exact versions stand in constraints.txt, ranges in pyproject.toml.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
