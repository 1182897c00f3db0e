# Every command of the project; `make help` lists them. EXPERIMENT=name selects config/<name>.yaml.

HERE := $(shell dirname '$(strip $(MAKEFILE_LIST))')
ifneq ($(HERE),.)
# Called as `make -f elsewhere/Makefile`: everything happens in the repository's folder.
.PHONY: $(sort help $(MAKECMDGOALS))
$(sort help $(MAKECMDGOALS)): ; @$(MAKE) --no-print-directory -C '$(HERE)' $@
else

EXPERIMENT ?= digits
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG := config/$(EXPERIMENT).yaml
SNAKEMAKE := snakemake --configfile $(CONFIG)
INSTALLED := .venv/installed

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help environment reproduce test bench lint pull dag report clean experiment

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo "EXPERIMENT=name selects config/<name>.yaml; now: $(EXPERIMENT)"

# Compared by content and place, not by date: a virtual environment does not survive being moved.
# A second make waits until the first has installed, instead of emptying .venv under it; where the file system
# has no locks it cannot wait.
environment: ## .venv with the exact versions of requirements.lock
	@exec 9< .; '$(PYTHON)' -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2> /dev/null; \
	wanted="$$(cat requirements.lock pyproject.toml | sha256sum) $$PWD"; \
	if [ "$$(cat $(INSTALLED) 2>/dev/null)" != "$$wanted" ]; then \
	  '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11) and "forgetrace needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")' \
	  && '$(PYTHON)' -m venv --clear .venv \
	  && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock \
	  && .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . \
	  && printf '%s\n' "$$wanted" > $(INSTALLED); \
	fi

experiment:
	@test -f '$(CONFIG)' || { echo "There is no $(CONFIG): EXPERIMENT is one of" $(basename $(notdir $(wildcard config/*.yaml))) >&2; exit 1; }

reproduce: environment experiment ## the whole experiment, or what is still missing of it
	python workflow/scripts/start_run.py $(CONFIG) all

# Two processes, each with whole files (--dist loadgroup does nothing with pytest 9.2); more would wait for the longest.
test: environment ## all tests
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

bench: environment experiment ## speed and memory against plain references; BENCH="scan fisher" measures some
	python -m benchmarks --config $(CONFIG) $(BENCH)

lint: environment ## style of code and rules, directions of imports
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint
	lint-imports

pull: CONFIG := config/digits.yaml
pull: environment ## data and results of the default experiment from the DVC remote
	dvc pull
	@dvc status --quiet || { echo "What was pulled is not what dvc.lock describes (see dvc status): nothing was marked as up to date." >&2; exit 1; }
	python workflow/scripts/start_run.py $(CONFIG) --cores 1 --quiet all --touch --forceall all

dag: environment experiment ## the rules and their order, as a graph (SVG where Graphviz is installed)
	@mkdir -p results/$(EXPERIMENT)
	$(SNAKEMAKE) --rulegraph dot all > results/$(EXPERIMENT)/rules.dot
	@if command -v dot > /dev/null; then dot -Tsvg -o results/$(EXPERIMENT)/rules.svg results/$(EXPERIMENT)/rules.dot; fi; \
	ls results/$(EXPERIMENT)/rules.*

report: environment experiment ## an HTML page of all tables and figures
	$(SNAKEMAKE) --report results/$(EXPERIMENT)/report.html all

clean: ## remove the environment, logs and caches; data and results stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build src/*.egg-info logs timings

endif
