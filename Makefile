# Everything runs in .venv, which is made at first use. A stamp file in it marks each finished
# installation, so that nothing is installed twice and an interrupted one starts again.

# The first of these that is Python 3.11 or newer makes .venv; `make test PYTHON=python3.12` allows only that one.
PYTHON ?= python3 python3.13 python3.12 python3.11
# More arguments for pytest: make test ARGS="-k guidance -x"
ARGS ?=

python := .venv/bin/python
pip_install := $(python) -m pip install --quiet --disable-pip-version-check

.PHONY: help demo demo-emoji test test-slow lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## train, sample and evaluate on the digits, on any machine
	$(python) main.py --config=configs/digits.py --workdir=runs/digits --mode=demo

demo-emoji: .venv/.installed-emoji ## the same on emoji in colour (6,000 steps; 15 to 40 minutes on 2 cores)
	$(python) main.py --config=configs/emoji.py --workdir=runs/emoji --mode=demo

test: .venv/.installed-test ## run the tests; ARGS="..." goes to pytest
	$(python) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/.installed-test ## run the tests that take minutes, and golden ones as users compile, with checks of types
	IG_JAX_TESTS_WITH_XLA_DEFAULTS=1 $(python) -m pytest -m "slow or golden" \
	  --jaxtyping-packages=ig_jax,beartype.beartype $(ARGS)

lint: .venv/.installed-test ## check style and formatting
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean: ## remove .venv and caches, keep runs/
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	@for python in $(PYTHON); do \
	  $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "Making .venv with $$($$python --version) ($$python)"; \
	  $$python -m venv --clear .venv && touch $@; exit; \
	done; \
	echo "No Python 3.11 or newer with its venv module among: $(PYTHON); install one" \
	  "(Debian, Ubuntu: apt install python3-venv) or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1

.venv/.installed: requirements.txt .venv/.created
	@echo "Installing requirements.txt into .venv (a few minutes the first time)"
	@$(pip_install) -r requirements.txt
	@touch $@

.venv/.installed-emoji: requirements-emoji.txt .venv/.installed
	@$(pip_install) -r requirements.txt -r requirements-emoji.txt
	@touch $@

.venv/.installed-test: requirements-test.txt requirements-emoji.txt .venv/.installed
	@echo "Installing requirements-test.txt into .venv"
	@$(pip_install) -r requirements.txt -r requirements-emoji.txt -r requirements-test.txt
	@touch $@
