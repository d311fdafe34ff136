# make demo · make test · make check · make docs · make bench · make holdout (each installs what it needs into .venv)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install demo test test-quick test-lowest test-models torture check style docs bench holdout clean
.DEFAULT_GOAL := help

help:
	@echo "make install      .venv with emogen and all that the other targets need; then: source .venv/bin/activate"
	@echo "make demo         score a small model on the sample posts, tune it, score it again"
	@echo "make test         all tests"
	@echo "make test-quick   the tests that need no browser, no network and little time"
	@echo "make test-models  every architecture of transformers, tiny"
	@echo "make torture      kills, pairs, damage, full disks, hostile input: hours, resumable"
	@echo "make test-lowest  all tests with the lowest versions that pyproject.toml allows"
	@echo "make check        lint, format, types, the rule of imports, links and code blocks of the docs"
	@echo "make style        fix lint and format where that can be done"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make bench        the speed of training and decoding beside that of others (an hour; QUICK=1 for a look)"
	@echo "make holdout      one epoch on real posts: make holdout DATA=path/to/2018-E-c-En-train.txt"

install: $(VENV)/installed

# emogen alone, which is enough for the demo. torch first and by its exact version: a range would fetch a CUDA build of
# several GB.
$(VENV)/base: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed; name yours: make install PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, apt-get install python3.11-venv"; exit 1; }
	@echo "torch (200 MB) ..."
	$(PIP) install --quiet --progress-bar on $$(grep '^torch==' constraints.txt)
	@echo "emogen and its libraries (a minute or two) ..."
	$(PIP) install --quiet --progress-bar on --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed: $(VENV)/base
	@echo "what tests, the lab, sweeps and pods need (a minute or two) ..."
	$(PIP) install --quiet --progress-bar on --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/base
	rm -rf runs/demo
	@echo "1 of 3: the model as it is labels 125 posts"
	$(BIN)/emogen predict recipes/demo.yaml sample/test.csv -o runs/zero_shot.csv --overwrite
	@echo "2 of 3: its scores"
	$(BIN)/emogen score sample/test.csv runs/zero_shot.csv
	@echo "3 of 3: the model is tuned on 500 posts, and scored on the same 125"
	$(BIN)/emogen train recipes/demo.yaml
	@echo "The report is runs/demo/report.html. A second epoch scores higher:"
	@echo "emogen train recipes/demo.yaml num_train_epochs=2 output_dir=runs/longer"

WORKERS ?= auto
PYTEST = -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: install
	$(BIN)/python $(PYTEST)

test-quick: install
	$(BIN)/python $(PYTEST) -m "not slow and not browser and not network and not exhaustive"

# Every architecture that transformers can generate text with (4 minutes).
test-models: install
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "exhaustive or not exhaustive" tests/model/test_architectures.py

# The lowest versions that pyproject.toml allows, in an environment of their own; an index may replace them one day.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python $(PYTEST)

# Hours; it continues where it was stopped. CASES="kill train=10,pair cv=2", JOBS=4
torture: install
	cd tests && ../$(BIN)/python -m torture ../runs/torture --jobs $(or $(JOBS),1) --cases "$(CASES)"

.venv-lowest/installed: pyproject.toml install
	$(PYTHON) -m venv --clear .venv-lowest
	$(PIP) install --quiet "$$(grep '^uv==' constraints.txt)"
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra dev --no-emit-package emogen-toolkit --output-file .venv-lowest/lowest.txt pyproject.toml
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar on --requirement .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_docs.py

docs: install
	$(PIP) install --quiet --progress-bar on --constraint constraints.txt --editable '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "The pages are in site/ (the search needs a server: python -m http.server --directory site)"

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(PIP) install --quiet --progress-bar on --constraint constraints.txt --editable '.[dev,bench]'
	test -d runs/demo/adapter || $(MAKE) demo
	$(BIN)/python benchmarks/train_speed.py $(if $(QUICK),--quick,--json benchmarks/results/train_speed.json)
	$(BIN)/python benchmarks/decode_speed.py $(if $(QUICK),--quick,--json benchmarks/results/decode_speed.json)

holdout: install
	@test -f "$(DATA)" || { echo "name the task's training file: make holdout DATA=path/to/2018-E-c-En-train.txt"; exit 1; }
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml emogen/train.py recipes/smollm2-135m.yaml \
		train_file=$(DATA) output_dir=runs/holdout-smollm2-135m

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
