# Two commands from a fresh clone: `make verify` shows what the project is for, `make test` tests the project itself.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS = constraints/tested.txt
JUNIT ?=

.PHONY: verify test

verify: $(VENV)/.installed
	$(VENV)/bin/python -P -m pytest --batch-invariant --pyargs pytest_batchinv.suite -c /dev/null --rootdir . -p no:cacheprovider

test: $(VENV)/.installed
	$(VENV)/bin/python -P -m pytest -n 2 --dist loadgroup $(if $(JUNIT),--junitxml $(JUNIT))

# torch first and pinned: a range would let pip take a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint $(CONSTRAINTS) torch==2.13.0
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@
