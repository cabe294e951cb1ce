# make repro: from clone to trained, evaluated checkpoints    make test: the tests
# make check: format, lint, types                             make table: what each stage taught

SHELL := /bin/sh
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: repro test check table install clean

repro: install
	dvc repro
	@python -m minimind.cli.table

table:
	@python -m minimind.cli.table

test: install
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadgroup

check: install
	ruff format --check .
	ruff check .
	mypy

install: .venv/installed

# Exact versions stand in constraints.txt, ranges in pyproject.toml.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
