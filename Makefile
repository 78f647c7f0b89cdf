# Every target sets up what it needs, and says so.
ifndef PYTHON
PYTHON := $(shell scripts/python)
endif
BENCH_ARGS ?=
CHAOS_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
# Most tests wait most of the time, so there may be more of them at once than CPUs.
TEST_JOBS ?= 4
export PYTHON

help:
	@echo "make demo            everything in one command, without Apache: http://127.0.0.1:8080 (DEMO_ARGS=...)"
	@echo "make demo-apache     the same page under a private Apache with PHP: http://127.0.0.1:8081 (root or sudo)"
	@echo "make test            lint and all tests, with real Apache, PHP and browser (root or sudo; TEST_ARGS=...)"
	@echo "make lint            ruff, mypy --strict, the C compiler's warnings"
	@echo "make compile         forkd's hot modules, by mypyc; make test, bench and install do it too (root or sudo: headers)"
	@echo "make bench           forkd beside the physical limit (BENCH_ARGS=..., see scripts/bench/README.md)"
	@echo "make chaos           reloads, upgrades and kills under load: who notices? (CHAOS_ARGS=--short, docs/chaos.md)"
	@echo "make module          build the Apache module;  make install-module  install and enable it (root)"
	@echo "make uninstall-module  disable and remove it (root; PURGE=1: its configuration too)"
	@echo "make install         install forkd itself into /opt/forkd, with a service for systemd (root)"
	@echo "make uninstall       remove it, but for configuration and data (root; PURGE=1: those too)"

demo:
	@scripts/bootstrap run
	@exec .venv/bin/forkd demo $(DEMO_ARGS)

demo-apache:
	@scripts/bootstrap apache
	@exec scripts/demo-apache

test:
	@scripts/bootstrap test
	@lint=0; scripts/lint || lint=$$?; .venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS) || exit $$?; \
		[ $$lint = 0 ] || { echo "The tests passed, but lint did not: make lint" >&2; exit 1; }

compile:
	@scripts/bootstrap compile

lint:
	@scripts/bootstrap lint
	@scripts/lint

bench:
	@scripts/bootstrap $(if $(findstring --rival,$(BENCH_ARGS)),rivals,bench)
	@exec .venv/bin/python scripts/bench/bench.py $(BENCH_ARGS)

chaos:
	@scripts/bootstrap bench
	@exec .venv/bin/python scripts/chaos.py $(CHAOS_ARGS)

module:
	@$(MAKE) -s -C apache module

install-module:
	@$(MAKE) -s -C apache install-module

uninstall-module:
	@$(MAKE) -s -C apache uninstall-module

install:
	@scripts/install

uninstall:
	@scripts/uninstall

clean:
	rm -rf build .venv *.egg-info forkd/_compiled*
	@$(MAKE) -s -C apache clean

.PHONY: help demo demo-apache test compile lint bench chaos module install-module uninstall-module install uninstall clean
