# `make quickstart` and `make test` work on a fresh machine; everything else is for contributors.
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed
# mypy names modules after folders, and a checkout may be called anything: it gets a tree of links called trfpp.
PACKAGE := $(wildcard *.py) configs data_prep infer study train trf

.PHONY: quickstart test check install wheel clean
quickstart: $(INSTALLED)
	$(PY) -m trfpp quickstart

test: check
	$(PY) -m pytest -n 2 --dist loadfile

check: $(INSTALLED)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	mkdir -p build/types/trfpp && ln -sfn $(addprefix ../../../,$(PACKAGE)) build/types/trfpp/
	cd build/types && ../../$(PY) -m mypy --config-file ../../pyproject.toml -p trfpp
	.venv/bin/lint-imports

install: $(INSTALLED)
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[test,dev]"
	touch $(INSTALLED)

wheel: $(INSTALLED)
	$(PY) -m build --wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
