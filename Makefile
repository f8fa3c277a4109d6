# make demo        install into .venv, run the quickstart, print its table
# make test        install, lint, tests, and every notebook in the smoke profile; ten minutes of one core
# make coverage    the same, and no less than 95 % of the lines; what CI runs
# make older       the tests whose numbers depend on the processor, once more with the instructions of older ones
# make bench       run every benchmark, into results/benchmarks/; EMQ_ANY_PRECISION: a checkout to measure against
# make faults      disturb jobs in real processes, many times over, into results/reliability/, and the tests that take minutes; half an hour
# make mutants     change the sources in hundreds of places: does a test notice? into results/reliability/; ten minutes
# make browser     run the quickstart in JupyterLab in headless Chromium, if one is installed; look at build/browser.png
# make figures     redraw every figure in results/ from the CSV beside it
# make results     train what the notebooks need, JOBS runs side by side, and execute them: PROFILE=small (default), smoke
#                  or paper; goes on where it was stopped. BUDGET=seconds stops it; ONLY="01_cifar10 12_deploy" takes some
# Another interpreter: make install PYTHON=python3.12

PYTHON  ?= python3
PROFILE ?= small
JOBS    ?= 2
VENV    := $(CURDIR)/.venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
DEMO    := $(CURDIR)/build/demo

# "python3" is the venv's own kernel, whatever kernels and settings the user's home holds; nothing is written there.
export JUPYTER_PATH       := $(VENV)/share/jupyter
export JUPYTER_CONFIG_DIR := $(CURDIR)/build/jupyter
export IPYTHONDIR         := $(CURDIR)/build/ipython

# glibc hands freed megabytes back to the kernel and faults them in again in the next step, which makes a training step
# on a CPU up to twice as long. Other allocators ignore these.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 1000000000

.PHONY: install demo test coverage older lint format bench faults mutants browser figures results clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[deploy,distributed,notebook,test]"
	touch $@

demo: install
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/papermill -k python3 --log-output notebooks/00_quickstart.ipynb $(DEMO)/00_quickstart.ipynb \
		-p results_dir $(DEMO) \
		|| { echo "make demo: the notebook failed; what it did is in $(DEMO)/00_quickstart.ipynb" >&2; exit 1; }
	@echo; cat $(DEMO)/*/00_quickstart.md; echo
	@ls $(DEMO)/*/00_quickstart.* $(DEMO)/00_quickstart.ipynb

# Tests of one file run in one process, which makes once what they share. Counting lines takes a fifth longer. nbval
# reports what the notebooks do; warnings of the Jupyter stack around them are not ours to fail on. Processes beside one
# another wait for each other's threads, of which each has one.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(COUNTED)
	OMP_NUM_THREADS=1 EMQ_PROFILE=smoke $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval-lax \
		--nbval-current-env --nbval-cell-timeout=300 -o addopts= -W default notebooks

coverage: COUNTED = --cov=emqlib --cov-fail-under=95 --cov-report=term:skip-covered
coverage: test

older: install
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m processor

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Time to an accuracy is measured against another project's code, which is not ours to bring.
BENCHMARKS := $(filter-out %/redraw.py $(if $(EMQ_ANY_PRECISION),,%/any_precision.py),$(sort $(wildcard benchmarks/*.py)))

bench: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[bench]"
	for benchmark in $(BENCHMARKS); do $(BIN)/python $$benchmark || exit 1; done

faults: install
	$(BIN)/python -m pytest -m thorough
	$(BIN)/python tests/faults.py

mutants: install
	$(BIN)/python tests/mutation.py

browser: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[browser]"
	$(BIN)/python tests/browser.py

figures: install
	$(BIN)/python -m emqlib.figures
	$(BIN)/python benchmarks/redraw.py

results: install
	$(BIN)/python -m emqlib.suite $(ONLY) --profile $(PROFILE) --jobs $(JOBS) $(if $(BUDGET),--budget $(BUDGET))

# Leaves .venv, which is gigabytes to install again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage*
	find emqlib tests notebooks -name __pycache__ -prune -exec rm -rf {} +
