# SPDX-License-Identifier: Apache-2.0
# make demo | test | check | soak | bench: each sets up what it needs in .venv and the user's runtime directory.

VENV := .venv
PYTHON := $(VENV)/bin/python
ENCLAVE := $(VENV)/bin/enclave
STAMP := $(VENV)/.installed
GUEST := $(wildcard guest/*/*)
PYTEST := $(PYTHON) -m pytest

.PHONY: demo test check fuzz soak bench format programs runtime kernel clean

demo: $(STAMP) runtime
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/hello/demo

test: programs check
	$(MAKE) kernel
	$(PYTEST) tests/vm -m vm

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTEST) tests/unit -n auto --dist worksteal

# Needs a Python that atheris has a wheel for.
fuzz: $(STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(PYTHON) tests/fuzz/worst.py
	$(PYTHON) tests/fuzz/mutations.py
	$(PYTHON) tests/fuzz/run.py --seconds 60

soak: $(STAMP) runtime
	$(PYTEST) tests/soak -m soak --timeout 3600

bench: $(STAMP) runtime programs
	$(PYTHON) bench/measure.py
	$(PYTHON) bench/eif.py
	$(PYTHON) bench/image.py
	$(PYTHON) bench/boot.py
	$(PYTHON) bench/boot_protocols.py
	$(PYTHON) bench/vsock.py
	$(PYTHON) bench/attest.py
	$(PYTHON) bench/nsm.py

format: $(STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

programs:
	tools/test-programs

runtime: $(STAMP)
	$(ENCLAVE) runtime install

# Minutes, the first time; then it is found.
kernel: runtime
	$(ENCLAVE) kernel build

# Anew when the guest's code or what is needed changes; Python code is used where it lies.
$(STAMP): pyproject.toml hatch_build.py $(GUEST)
	tools/make-venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
