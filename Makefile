# Every target sets up what it needs; after that nothing here touches the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export FEDLOOM_CACHE ?= $(CURDIR)/.cache
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test prove chaos check fix proto docs bench study-small wheels wheels-test clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[client,server,dev]'
	$(BIN)/python -m fedloom.client.assets minilm-l6 sentiment
	touch $@

demo: setup
	fedloom simulate examples/sentiment.toml

test: setup
	pytest

# Everything that is too heavy for every change, at full size.
prove: setup
	FEDLOOM_PROVE=1 pytest -m prove

# Kills, stops and confuses every process at full size; writes benchmarks/chaos.json and docs/track-record.md.
chaos: setup
	PYTHONPATH=. python benchmarks/chaos.py

check: setup
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	python docs/make_reference.py --check
	python docs/make_mutations.py --check
	$(MAKE) --no-print-directory proto
	git diff --exit-code -- proto

fix: setup
	ruff format .
	ruff check --fix .

proto: setup
	python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
		--mypy_grpc_out=quiet:proto proto/fedloom/proto/v1/federation.proto

docs: setup
	python docs/make_reference.py
	python docs/make_mutations.py

bench: setup
	fedloom bench round
	fedloom bench dp-step
	fedloom bench secagg
	fedloom bench clients

study-small: setup
	python benchmarks/study_small.py

# Everything a site without internet needs, for machines like this one; EXTRA=client or server.
EXTRA ?= client
wheels: setup
	python deploy/bundle.py dist/fedloom-$(EXTRA) --extra $(EXTRA)

wheels-test:
	rm -rf dist/fedloom-server
	$(MAKE) --no-print-directory wheels EXTRA=server
	deploy/check-bundle dist/fedloom-server

clean:
	rm -rf $(VENV) .cache dist
