# make demo   fine-tunes the small pipeline in demo/ and shows before | after
# make demo-unconditional   trains a model of digits from scratch, and judges what it draws
# make test   checks and tests
# Both install what they need into .venv first.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
RUN = .venv/bin/python
INSTALLED = .venv/installed-$(shell cat requirements.txt requirements-dev.txt constraints.txt | cksum | cut -d' ' -f1)

.PHONY: demo demo-lora demo-unconditional compare chaos fuzz golden gpu gpu-prepare test test-slow older test-older \
	nightly check install base clean

demo: $(INSTALLED)
	$(RUN) demo/run.py

demo-lora: $(INSTALLED)
	$(RUN) demo/run.py --adaptation lora

# a model of digits from scratch, drawn and judged
demo-unconditional: $(INSTALLED)
	$(RUN) demo/unconditional.py

# fine-tunes the demo with each loss, weighting, adaptation and optimizer, and writes the table in demo/README.md
compare: $(INSTALLED)
	$(RUN) demo/compare.py

test: check
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow"

# what takes several processes and minutes; continuous integration runs it after the others
test-slow: $(INSTALLED) older
	$(RUN) -m pytest -n 2 --dist worksteal -m slow

# an environment with transformers 4 and diffusers 0.35, which must open what is trained here
older: $(INSTALLED)
	$(RUN) tests/environments.py older .venv-older

test-older: older
	$(RUN) -m pytest tests/scripts/test_older_libraries.py

# trains with the lower bounds of requirements.txt and with the newest releases, and what else takes long
nightly: $(INSTALLED)
	$(RUN) tests/nightly.py

# kills runs at random moments, and compares what they come to with runs left alone: make chaos ROUNDS=100
ROUNDS ?= 100
chaos: $(INSTALLED)
	$(RUN) tests/chaos.py --rounds $(ROUNDS)

# damages files of every kind that is read, and looks for tracebacks, hangs and memory eaten: make fuzz ROUNDS=1000
fuzz: $(INSTALLED)
	$(RUN) tests/fuzz.py --rounds $(ROUNDS)

# compares losses and exported weights of small runs with an earlier commit's, bit for bit: make golden BASE=c0d6448
BASE ?= c0d6448
golden: $(INSTALLED)
	$(RUN) tests/golden.py --base $(BASE)

# proves and measures on a GPU what no CPU can, in nine minutes; beside diffusers' own scripts where .peer/ holds them
gpu: $(INSTALLED)
	$(RUN) benchmarks/gpu.py $(if $(wildcard .peer),--peer .peer)

# for a machine with a GPU and no network: wheels that it may lack, in .whl/, and what belongs into .peer/
gpu-prepare: $(INSTALLED)
	$(RUN) benchmarks/gpu_prepare.py

check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	$(RUN) tests/house.py --limits

install: $(INSTALLED)

# repeats the pretraining of the pipeline in demo/base
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
