# Every target sets up what it needs; after that nothing here touches the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export FEDLOOM_CACHE ?= $(CURDIR)/.cache
export PATH := $(CURDIR)/$(BIN):$(PATH)

# For the containers: which compose, how many clients, and whose the adapter in ./out will be (never root's).
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
CLIENTS ?= 4
IDS := $(shell id -u):$(shell id -g)
export FEDLOOM_USER ?= $(if $(filter 0:%,$(IDS)),10001:10001,$(IDS))

.PHONY: setup flower demo test test-slow prove chaos check fix proto docs bench bench-peers study recipes compose compose-test image-wheels lock wheels wheels-test clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[client,server,dev]'
	$(BIN)/python -m fedloom.client.assets.fetch minilm-l6 minilm-l3 minilm-l3-mean sentiment
	touch $@

# Flower wants protobuf below 7 and typer below 0.21, our pins are above: its commands get an environment of their own.
FLOWER := .venv-flower

flower: $(FLOWER)/.ready

$(FLOWER)/.ready: pyproject.toml flower/constraints.txt
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --upgrade pip
	$(FLOWER)/bin/python -m pip install --quiet -c flower/constraints.txt -e '.[server,flower]'
	touch $@

demo: setup
	fedloom simulate examples/findings.toml --probe 2

# A worker for each core, with one thread of torch; a file's tests share its fixtures, and therefore a worker.
PYTEST := OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 4

test: setup flower
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow"

# What takes longest: whole federations that are killed, foreign models, tutorials, notebooks. CI runs both.
test-slow: setup flower
	$(PYTEST) --dist worksteal -m slow

# Everything that is too heavy for every change, at full size.
# The attacks write their report as chaos does.
prove: setup
	FEDLOOM_PROVE=1 pytest -m prove --ignore tests/attacks
	PYTHONPATH=. python benchmarks/chaos.py --only "attacks: low bits of the noise" \
		--only "attacks: neighbouring data sets" --only "attacks: hostile numbers"

# Kills, stops and confuses every process at full size; writes benchmarks/chaos.json and docs/track-record.md.
chaos: setup
	PYTHONPATH=. python benchmarks/chaos.py

check: setup
	ruff format --check .
	ruff check .
	mypy
	pyright
	lint-imports
	python -m docs.make_reference --check
	python -m docs.make_mutations --check
	python -m docs.make_papers --check
	python -m docs.make_study --check
	python -m docs.make_wire --check
	python -m docs.make_families --check
	python -m docs.make_peers --check
	python -m docs.make_gallery --check
	$(MAKE) --no-print-directory proto
	git diff --exit-code -- proto

fix: setup
	ruff format .
	ruff check --fix .

proto: setup
	python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
		--mypy_grpc_out=quiet:proto proto/fedloom/proto/v1/federation.proto

docs: setup
	python -m docs.make_reference
	python -m docs.make_mutations
	python -m docs.make_papers
	python -m docs.make_study
	python -m docs.make_wire
	python -m docs.make_families
	python -m docs.make_peers
	python -m docs.make_gallery
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --site-dir site

bench: setup
	fedloom bench round
	fedloom bench dp-step
	fedloom bench secagg
	fedloom bench clients

# fedloom beside other frameworks on the same work, each in an environment of its own; ARGS are benchmarks/peers/run.py's.
PEERS := $(patsubst %,.venv-peers/%/.ready,pfl flower nvflare)
ARGS ?=
bench-peers: setup $(PEERS)
	PYTHONPATH=benchmarks python -m peers.run $(ARGS)
	python -m docs.make_peers

.venv-peers/%/.ready: benchmarks/peers/%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/$*/bin/python -m pip install --quiet -r $<
	touch $@

# Clothes come with the system's packages: apt-get install dataset-fashion-mnist.
study: setup
	python -m fedloom.client.assets.fetch minilm-l3-mean dinov2-small sentiment
	python benchmarks/study.py

# Runs the gallery's recipes one after the other, about forty minutes on two idle cores, and writes what came out.
RECIPES := triage findings complaints preferences instruct dictation keywords defects
recipes: setup
	python -m fedloom.client.assets.fetch smollm2-135m dinov2-small whisper-base
	rm -rf runs/recipes
	for name in $(RECIPES); do fedloom simulate examples/$$name.toml --out runs/recipes || exit 1; done
	python -m docs.make_gallery $(RECIPES:%=runs/recipes/%)

# A coordinator and CLIENTS clients in containers of their own; ends when the run does, with the adapter in out/adapter.
compose:
	mkdir -p out
	[ "$$(id -u)" -ne 0 ] || chown $(FEDLOOM_USER) out
	$(COMPOSE) -f docker/compose.yaml up --build --scale client=$(CLIENTS)

# Builds the images, runs a federation and kills its containers. Takes a Docker engine, and says so if there is none.
compose-test: setup
	FEDLOOM_COMPOSE="$(COMPOSE)" pytest -rs tests/compose

# What the images install, for builds without a network.
image-wheels: setup
	python -m docker.wheels

# The hashes of what images and bundles install; after a change of constraints.txt or pyproject.toml. Takes minutes.
lock:
	$(PYTHON) -m docker.lock

# Everything a site without internet needs, for machines like this one; EXTRA=client or server.
EXTRA ?= client
wheels: setup
	python deploy/bundle.py dist/fedloom-$(EXTRA) --extra $(EXTRA)

wheels-test:
	rm -rf dist/fedloom-server
	$(MAKE) --no-print-directory wheels EXTRA=server
	deploy/check-bundle dist/fedloom-server

clean:
	rm -rf $(VENV) $(FLOWER) .venv-peers .cache dist
