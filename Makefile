PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)
# without bytecode on disk, each of the many processes would compile torch and open_clip again, for 20 s
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo demo-two-stage test test-all test-quick kills lint
# tests run in one process more than there are cores, up to 5, as some wait for others; each takes whole files, so that fixtures are made once
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PROCESSES := $(shell echo $$(( ($(CORES) > 4 ? 4 : $(CORES)) + 1 )))
# in the order of the folders: those that take longest, tests/launch, do not come last
TESTS := python -m pytest -q --dist loadfile --no-loadscope-reorder
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	python -c 'from c4c.zero.distributed import compile_ops; compile_ops()' & python -m c4c.shard demo --out data/demo && wait && deepspeed launch/train.py --cfg demo.yaml run.resume=auto && python launch/eval.py --ckpt runs/demo --json runs/demo/eval.json --report runs/demo/report.html && python -m c4c.index --ckpt runs/demo --videos data/demo/source/test --out runs/demo.index && python launch/search.py runs/demo.index 'a yellow star gives way to a cyan circle on stripes' -k 3

demo-two-stage: $(VENV)/ready
	python -c 'from c4c.zero.distributed import compile_ops; compile_ops()' & python -m c4c.shard demo-narrated --out data/narrated && wait && python launch/stages.py --cfg demo_two_stage.yaml

.PHONY: study
study: $(VENV)/ready
	python -c 'from c4c.zero.distributed import compile_ops; compile_ops()' & python -m c4c.shard demo --out data/demo && python -m c4c.shard demo-narrated --out data/narrated && wait && python -m c4c.study --cfg study_demo.yaml

test: $(VENV)/compiled
	$(TESTS) -n $(PROCESSES) -m 'not nightly'

test-all: $(VENV)/compiled
	$(TESTS) -n $(PROCESSES)

test-quick: $(VENV)/ready
	$(TESTS) -n $(PROCESSES) --quick

kills: $(VENV)/ready
	python tests/launch/kills.py --tries 20 && python tests/launch/faults.py

lint: $(VENV)/ready
	ruff check . && ruff format --check . && mypy

.PHONY: docs
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

$(VENV)/docs: $(VENV)/ready
	pip install --no-compile -q -e '.[docs]' -c constraints.txt && touch $@

# beforehand: it takes minutes of the processor, and a test that waits for it would run into its time limit
$(VENV)/compiled: $(VENV)/ready
	python -c 'from c4c.zero.distributed import compile_ops; compile_ops()' && touch $@

$(VENV)/ready: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV) && pip install --no-compile -q -r requirements.txt -e '.[test]' -c constraints.txt && touch $@
