# make demo        install into .venv, run the quickstart, print its table and what to do next
# make test        install, lint, tests, and every notebook in the smoke profile
# make bench       run every benchmark, into results/benchmarks/; EMQ_ANY_PRECISION: a checkout to measure against
# make faults      disturb jobs in real processes, many times over, into results/reliability/; ten minutes
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

.PHONY: install demo test lint format bench faults mutants browser figures results clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing PyTorch, JupyterLab and what else is needed into .venv: once, some minutes, about 6 GB"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[deploy,distributed,notebook,test]"
	@touch $@

# The notebook prints the progress of its training and nothing else; the table shown is the one that it wrote.
demo: install
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "Training a small network on handwritten digits at several bit-widths, twice: about a minute on a CPU"
	@$(BIN)/papermill -k python3 --log-level ERROR --no-progress-bar --stdout-file - \
		notebooks/00_quickstart.ipynb $(DEMO)/00_quickstart.ipynb -p results_dir $(DEMO) 2> $(DEMO)/messages.txt \
		|| { cat $(DEMO)/messages.txt >&2; \
		echo "make demo: the notebook failed; what it did is in $(DEMO)/00_quickstart.ipynb" >&2; exit 1; }
	@echo
	@echo "One network, run with more or fewer bits for each weight and activation: the share of test images it gets right"
	@echo; cat $(DEMO)/*/00_quickstart.md
	@echo "* trained at this bit-width; it was never trained at the others"
	@echo
	@echo "Figure: $$(ls $(DEMO)/*/00_quickstart.png)"
	@echo "Next:   $(BIN)/jupyter lab notebooks/00_quickstart.ipynb, which made this; README.md for your own network"

# nbval reports what the notebooks do; warnings of the Jupyter stack around them are not ours to fail on. Kernels beside
# one another wait for each other's threads, of which each has one.
test: lint
	$(BIN)/python -m pytest -n $(JOBS) --cov=emqlib --cov-fail-under=95 --cov-report=term:skip-covered
	OMP_NUM_THREADS=1 EMQ_PROFILE=smoke $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval-lax \
		--nbval-current-env --nbval-cell-timeout=300 -o addopts= -W default notebooks

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
