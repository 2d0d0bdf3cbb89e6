# Everything sets itself up: a fresh machine needs Python 3.11+, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SCAN := export/data/example_ct.nii.gz

.PHONY: demo test lint clean

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# From an original-format checkpoint and a CT to 18 scores, the export's error, and the latency beside PyTorch.
demo: $(READY)
	$(BIN)/python -m dcformer_deploy.benchmarks.demo_checkpoint --out demo/model
	$(BIN)/dcformer export demo/model/checkpoint.pth --tokenizer demo/model/tokenizer --out demo/bundle --force
	$(BIN)/dcformer bench demo/bundle --checkpoint demo/model/checkpoint.pth --runs 3
	$(BIN)/dcformer zeroshot demo/bundle $(SCAN)

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist demo *.egg-info
