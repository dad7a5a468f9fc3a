# make install: set up .venv.  make demo: distil the small teacher in assets/tiny_sd.
# make serve: draw on a live page in the browser.  make test: run the tests.
# make docs: build the documentation into site/.
# make fuzz: give 100,000 made-up inputs to all that reads files, options and prompts.
# make minimal: draw a picture where nothing but what is needed at run time is installed.
# make page: test the live page in Chromium and take assets/page.png.
# make soak: spoil runs on purpose, many times over, and print what was lost.
# All set up .venv by themselves; only Python 3.11+ and make are needed.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo serve test docs page soak fuzz minimal clean

install: .venv/run

# Two devices, so that XLA keeps two cores busy: a quarter faster than one (LOG.md).
demo: .venv/run
	JAX_NUM_CPU_DEVICES=2 $(BIN)/python -m slam_jax.main --config configs/tiny.py --workdir runs/tiny

serve: .venv/serve
	$(BIN)/python -m slam_jax.serve

test: .venv/test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Strict: a warning, such as a link to nowhere, is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

page: .venv/test .venv/serve
	$(BIN)/python -m pytest -m page tests/test_page.py

soak: .venv/test
	$(BIN)/python -m pytest -m soak tests/test_soak.py

fuzz: .venv/test
	$(BIN)/python -W ignore tests/fuzz.py --inputs 100000

minimal:
	rm -rf runs/minimal && $(PYTHON) -m venv runs/minimal
	runs/minimal/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt .
	runs/minimal/bin/python -P -m slam_jax.sample --prompt "a red circle above a blue square" --out runs/minimal.png

clean:
	rm -rf .venv runs site

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slam_jax needs Python 3.11 or newer; run: make $(MAKECMDGOALS) PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/docs: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/serve: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve]'
	touch $@

# torch comes first and by its exact version, or pip would fetch the build with CUDA.
.venv/test: .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
# Without what it asks for: torchvision, which the tests do not use and not every torch has.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps torch_fidelity
	touch $@
