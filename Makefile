# Every verb does what it needs first; `make test` is also what CI runs (.ci/run).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup topology demo test check sim storm bench docs up lock wheel clean

WITH_PATH := PATH="$(CURDIR)/.venv/bin:$(CURDIR)/.deps/etcd/usr/bin:$$PATH"
RUN := $(WITH_PATH) .venv/bin/python

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup: ## system tools, .deps/etcd, .venv with covey in it
	@scripts/setup.sh

demo: setup ## the whole story on this machine: a cloud, a template, a VM, a crash, a second layer, nothing left
	@$(RUN) scripts/demo.py $(ARGS)

test: setup ## everything CI checks; one part: make test ARGS=unit
	@$(RUN) scripts/test.py $(ARGS)

check: setup ## style, types, layers, documentation (no tests)
	@$(RUN) scripts/test.py check

sim: setup ## the simulated cloud: five minutes of fresh seeds, or one told aloud: make sim MINUTES=30, make sim SEED=7
	@$(RUN) -m tests.sim $(if $(SEED),--seed $(SEED),--seeds 1000000 --minutes $(or $(MINUTES),5) --first $(or $(FIRST),$$(date +%s)))

storm: setup ## a cloud of real programs under random faults and load: make storm MINUTES=30 SEED=7
	@$(RUN) -m tests.storm --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED))

bench: setup ## measurements: make bench ARGS="starts --quick", or idle, registry, failover, flood, outages
	@$(RUN) -m bench $(ARGS)

docs: setup ## draws the generated pages of docs/reference from the code
	@$(RUN) scripts/gen_docs.py

topology: setup ## controllers behind a balancer, to be broken by hand: make topology ARGS=haproxy|nginx|keepalived|nodeside
	@$(RUN) -m scripts.topology $(ARGS)

up: setup ## a cloud on this machine with synthetic nodes: make up ARGS="--nodes 100"
	@$(WITH_PATH) covey up $(ARGS)

lock: ## writes requirements.lock anew from pyproject.toml
	@$(RUN) -m uv pip compile pyproject.toml --group dev --universal --generate-hashes --no-header -q -o requirements.lock $(ARGS)

wheel: setup ## builds dist/covey-VERSION-py3-none-any.whl
	@scripts/wheel.sh $(ARGS)

clean: ## removes what make made, except the running cloud's data
	rm -rf .venv .deps dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
