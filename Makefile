# `make demo` and `make test` need Python 3.11 or newer, git and make; everything else they install into .venv.
#
#   make demo       show what app_db does
#   make test       run the tests: on SQLite, on a real PostgreSQL, and on MariaDB, PgBouncer, Redis and Chromium where they are
#                   installed
#   make test-all   run every test: MariaDB, PgBouncer, Redis and Chromium must be installed
#   make check      lint, types, layers, docs, test
#   make help       all of the targets

PYTHON ?= python3
PYTEST_ARGS ?=
SOAK ?=
BENCH ?=
COMPARE ?=
WORKERS ?= 2

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
EXTRAS := postgresql,mysql,asyncio,asyncpg,asyncmy
INSTALLED := $(VENV)/.installed
INSTALLED_SHOP := $(VENV)/.installed-shop
INSTALLED_DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help demo shop-fastapi shop-flask shop-pyramid shop-worker test test-all soak check lint format types layers docs coverage \
	bench compare clean

help:  ## say what the targets do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 21

# ---- set-up -----------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "app_db needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not there')." \
			"Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Dependency groups need pip 25.1.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing app_db"
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

$(INSTALLED_SHOP): $(INSTALLED)
	@echo "Installing the frameworks of the example"
	@$(PIP) install --group shop
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing what tests, checks and documentation need (a minute or two)"
	@$(PIP) install --group dev
	@touch $@

# ---- what people do ---------------------------------------------------------------------------------------------------

demo: $(INSTALLED)  ## show what app_db does, in a fresh directory
	@rm -rf build/demo && mkdir -p build/demo
	@cp settings.example.env build/demo/.env
	@cd build/demo && $(BIN)/python $(CURDIR)/examples/demo.py

# The databases are one SQLite file, unless build/shop/.env or the environment says otherwise.
SHOP = mkdir -p build/shop && cd build/shop && { [ -e .env ] || cp $(CURDIR)/examples/one-file.env .env; } && \
	PYTHONPATH=$(CURDIR)/examples exec $(BIN)/python -m shop

shop-fastapi: $(INSTALLED_SHOP)  ## start the example as a FastAPI application: http://127.0.0.1:8000 is its page
	@$(SHOP) fastapi

shop-flask: $(INSTALLED_SHOP)  ## start it as a Flask application
	@$(SHOP) flask

shop-pyramid: $(INSTALLED_SHOP)  ## start it as a Pyramid application
	@$(SHOP) pyramid

shop-worker: $(INSTALLED_SHOP)  ## start its Celery worker; SHOP_BROKER is the URL of a broker
	@$(SHOP) worker

test: $(INSTALLED_DEV)  ## run the tests in WORKERS processes, in a few minutes; PYTEST_ARGS goes to pytest
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# An empty -m takes the place of the one in pyproject.toml, which leaves the exhaustive tests out.
test-all: $(INSTALLED_DEV)  ## run every test; a server that is missing is a failure
	APP_DB_TEST_REQUIRE_SERVERS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m '' $(PYTEST_ARGS)

soak: $(INSTALLED_DEV)  ## look for rare mistakes for a long time; SOAK names one program
	$(BIN)/python tests/soak.py $(SOAK)
	$(if $(SOAK),,INTERRUPT_EVERYWHERE=1 $(BIN)/python -m pytest -n $(WORKERS) -m '' tests/units/test_interruptions.py)
	$(if $(SOAK),,SOAK_WHOLE=1 $(BIN)/python -m pytest -n $(WORKERS) -m '' tests/migrations/test_locks.py tests/testing/test_beside.py tests/units/test_exact_rows.py)

check: lint types layers docs test  ## everything that must pass

lint: $(INSTALLED_DEV)  ## look for mistakes and untidiness
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED_DEV)  ## make the code tidy
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

types: $(INSTALLED_DEV)  ## check the types with mypy and pyright, both strict
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

layers: $(INSTALLED_DEV)  ## check that dependencies point downward
	$(BIN)/python -m pytest -q tests/test_layers.py tests/project/test_public_names.py

docs: $(INSTALLED_DEV)  ## build the documentation into build/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "See build/docs/index.html"

# pytest-cov is there only for the projects whose tests are run by tests of the plugin.
coverage: $(INSTALLED_DEV)  ## run the tests and print which lines and branches they miss
	@rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest -m '' $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(INSTALLED_DEV)  ## measure the cost over bare SQLAlchemy, and print it in Markdown; BENCH names one benchmark
	@$(BIN)/python benchmarks/run.py $(BENCH)

compare: $(INSTALLED_DEV)  ## ask other libraries the same requests, and print what was committed; COMPARE names programs, or --write
	@$(BIN)/python benchmarks/peers/run.py $(COMPARE)

clean:  ## delete what the other targets made, .venv included
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .tox .coverage*
	find . -name __pycache__ -prune -exec rm -rf {} +
