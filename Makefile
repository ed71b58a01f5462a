# `make run` and `make test` need Python >= 3.11, make and a package index; everything else they install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.lock
STAMP := $(VENV)/.installed

.PHONY: install run test check soak lock clean

install: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r $(LOCK)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m streams.kinds
	touch $@

run: $(STAMP)
	@exec $(BIN)/citybrain run --simulate

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest -m "alone and not soak"
	$(BIN)/pytest -m "not soak and not alone" -n 4 --dist loadfile

soak: $(STAMP)
	$(BIN)/pytest -m soak --timeout 3600

# Needs `uv` on the PATH; the lock files name no index address.
lock:
	for extra in pi vibration camera server kafka dev; do \
	  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-package citybrain-senses \
	    --no-header --no-annotate --extra $$extra pyproject.toml -o requirements/$$extra.lock || exit 1; done

clean:
	rm -rf $(VENV) data
