# Every target sets up all it needs on a fresh machine with Python 3.10 or newer, once, and again when the pins change.

PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
BIN := $(VENV)/bin
OLDEST_DEEPSPEED := deepspeed==0.14.4
# What benchmarks compare with, apart from the environment, so that it changes nothing there.
PEERS := trl==1.16.0
# torch goes first and by its pin, so that no other requirement draws in a different build of it.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-distill test check bench test-matrix test-compat format system-packages

help:
	@echo "make quickstart       train the bundled tiny model, with 2 processes"
	@echo "make quickstart-distill  distil that model into a smaller one, and show what it gains"
	@echo "make test             run the whole suite, except what needs an accelerator"
	@echo "make check            formatter, linter, types, import rules"
	@echo "make format           format, and fix what the linter can"
	@echo "make bench            measure throughput and memory against bare PyTorch"
	@echo "make test-matrix      save under every strategy and world size, resume under every other"
	@echo "make test-compat      run the conformance suite on $(OLDEST_DEEPSPEED)"
	@echo "make system-packages  install what pip cannot, where this user may"

quickstart: $(VENV)/run.stamp
	$(BIN)/understudy train recipes/quickstart.yaml --overwrite

# The same student twice, for as many steps: from the data, and from the teacher.
quickstart-distill: $(VENV)/run.stamp
	test -f runs/quickstart/model/config.json || $(BIN)/understudy train recipes/quickstart.yaml --overwrite
	$(BIN)/understudy train recipes/quickstart-distill.yaml objective=causal_lm \
		output_dir=runs/quickstart-from-data --overwrite
	$(BIN)/understudy train recipes/quickstart-distill.yaml --overwrite
	$(BIN)/understudy compare runs/quickstart-from-data runs/quickstart-distill

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not device and not matrix" tests/real tests/distributed tests/unit

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/unit/test_cli_front.py -k "need_no_torch or without"

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.stamp build/peers.stamp
	$(BIN)/python -m benchmarks

test-matrix: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/distributed -m matrix

test-compat: $(COMPAT)/compat.stamp
	$(COMPAT)/bin/python -m pytest tests/distributed -m distributed -k conformance

# DeepSpeed before 0.15 calls numactl as it sets up ZeRO-3 on a processor; tests make hosts of their own, with sshd
# and pdsh, and a Slurm of them, and check shell scripts.
SYSTEM_PROGRAMS := numactl ip sshd ssh slurmctld munged shellcheck pdsh
SYSTEM_PACKAGES := numactl iproute2 openssh-server openssh-client slurm-wlm munge shellcheck pdsh

system-packages:
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	for program in $(SYSTEM_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -z "$$missing" ]; then echo "$(SYSTEM_PROGRAMS) are installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $(SYSTEM_PACKAGES); \
	else echo "missing:$$missing; install $(SYSTEM_PACKAGES) with your system's packages" >&2; exit 1; fi

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) '$(TORCH)'
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

build/peers.stamp: Makefile | $(VENV)/dev.stamp
	$(BIN)/python $(PIP_INSTALL) --no-deps --upgrade --target build/peers $(PEERS)
	touch $@

$(COMPAT)/compat.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPAT)
	sed 's/^deepspeed==.*/$(OLDEST_DEEPSPEED)/' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python $(PIP_INSTALL) '$(TORCH)'
	$(COMPAT)/bin/python $(PIP_INSTALL) -c $(COMPAT)/constraints.txt -e '.[test]'
	touch $@
