# Every target sets up what it needs, in .venv, from the package index alone.
PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
MARK ?= not slow and not gpu and not browser
CHROMIUM ?= /usr/bin/chromium
DEMO ?= --size 256 --iterations 60

.PHONY: demo test test-slow test-browser lint bench clean

demo: $(SET_UP)
	$(BIN)/python -m engine.stylize --demo $(DEMO) --overwrite -o demo.png
	@echo "demo.png written"

# Two processes, each with one thread for torch: more would wait for each other.
test: $(SET_UP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "$(MARK)"

test-slow: $(SET_UP)
	$(BIN)/python -c "import ray" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[cpu,dev,ray]'
	$(BIN)/python -m pytest -m slow -rP

test-browser: $(SET_UP)
	test -x $(CHROMIUM) || (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium)
	$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[cpu,dev,browser]'
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -m browser

# mypy does not follow the folder mapping of pyproject.toml, so it sees the package as links laid out as installed.
lint: $(SET_UP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .typing && mkdir .typing && cp -rs $(CURDIR)/engine .typing/engine
	cp -rs $(CURDIR)/kernels .typing/engine/kernels && cp -rs $(CURDIR)/export .typing/engine/export
	cd .typing && ../$(BIN)/mypy --config-file ../pyproject.toml -p engine

bench: $(SET_UP)
	$(BIN)/python -m benchmarks.compare --size 256
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only

$(SET_UP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev]'
	touch $@

clean:
	rm -rf .venv .typing .mypy_cache .ruff_cache .pytest_cache demo.png
