# make demo                 fine-tune the small pipeline in demo/ and show images before and after
# make demo-unconditional   train a model of digits from scratch and score its images
# make test                 run the linters and tests
# Each target first installs what it needs into .venv.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
RUN = .venv/bin/python
INSTALLED = .venv/installed-$(shell cat requirements.txt requirements-dev.txt constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo demo-lora demo-unconditional compare chaos fuzz golden gpu gpu-prepare test test-slow older test-older \
	nightly verdict check install base clean

demo: $(INSTALLED)
	$(RUN) demo/run.py

demo-lora: $(INSTALLED)
	$(RUN) demo/run.py --adaptation lora

# train a model of digits from scratch, draw with it, and score its images
demo-unconditional: $(INSTALLED)
	$(RUN) demo/unconditional.py

# fine-tune the demo with each loss, weighting, adaptation and optimizer, and update the table in demo/README.md
compare: $(INSTALLED)
	$(RUN) demo/compare.py

test: check
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow and not nightly"

# tests that need several processes or minutes; continuous integration runs them after the others
test-slow: $(INSTALLED) older
	$(RUN) -m pytest -n 2 --dist worksteal -m slow

# create an environment with transformers 4 and diffusers 0.35, in which exported models must load
older: $(INSTALLED)
	$(RUN) tests/environments.py older .venv-older

test-older: older
	$(RUN) -m pytest tests/scripts/test_older_libraries.py

# train with the minimum versions of requirements.txt and with the newest releases; other long checks
nightly: $(INSTALLED)
	$(RUN) tests/nightly.py

# plant faults in the demo, and count how often the verdict names them; finished runs are kept, so it can be continued
verdict: $(INSTALLED)
	$(RUN) tests/verdicts.py

# kill runs at random moments, and compare their results with uninterrupted runs: make chaos ROUNDS=100
ROUNDS ?= 100
chaos: $(INSTALLED)
	$(RUN) tests/chaos.py --rounds $(ROUNDS)

# damage input files of every kind, and check for tracebacks, hangs and excessive memory use: make fuzz ROUNDS=1000
fuzz: $(INSTALLED)
	$(RUN) tests/fuzz.py --rounds $(ROUNDS)

# compare losses and exported weights of small runs with those of an earlier commit, bit for bit: make golden BASE=c0d6448
BASE ?= c0d6448
golden: $(INSTALLED)
	$(RUN) tests/golden.py --base $(BASE)

# run checks and benchmarks that need a GPU, in nine minutes; compare with the diffusers scripts in .peer/, if present
gpu: $(INSTALLED)
	$(RUN) benchmarks/gpu.py $(if $(wildcard .peer),--peer .peer)

# prepare a GPU machine without network: download wheels to .whl/, and list what to put in .peer/
gpu-prepare: $(INSTALLED)
	$(RUN) benchmarks/gpu_prepare.py

check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	$(RUN) tests/house.py --limits

install: $(INSTALLED)

# pretrain the pipeline in demo/base again
base: $(INSTALLED)
	$(RUN) demo/make_base.py --output_dir demo/build/base

$(INSTALLED):
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or later is needed; install it or give make PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv; install it (Debian: apt install python3-venv)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@rm -f .venv/installed-*
	@touch $@

clean:
	rm -rf demo/output
