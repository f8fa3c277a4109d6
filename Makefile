# make demo        install into .venv, run the quickstart, print its table and what to do next
# make test        install, lint, tests, and every notebook in the smoke profile; ten minutes of one core
# make coverage    the same, and no less than 95 % of the lines; what CI runs
# make older       the tests whose numbers depend on the processor, once more with the instructions of older ones
# make bench       run every benchmark, into results/benchmarks/; EMQ_ANY_PRECISION: a checkout to measure against
# make faults      disturb jobs in real processes, many times over, into results/reliability/, and run the tests that take
#                  minutes; half an hour
# make mutants     change the sources in hundreds of places, by mutmut: which changes does no test notice? hours; it goes on
# make docs        build the site into build/site: guide, recipes, reference, all notebooks as they were executed
# make figures     redraw every figure in results/ from the CSV beside it
# make results     execute the notebooks, JOBS side by side, which train what is not trained yet: PROFILE=small (default),
#                  smoke or paper; ONLY="01_cifar10 12_deploy" takes some. Stopped at any time, it goes on from there
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

MAKEFLAGS += --no-print-directory

.PHONY: install demo test coverage older lint format bench faults mutants docs figures results clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing PyTorch, JupyterLab and what else is needed into .venv: once, some minutes, about 6 GB"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[deploy,distributed,docs,notebook,test]"
	@touch $@

# The notebook prints the progress of its training and nothing else; the table shown is the one that it wrote. One thread, as
# the committed rows: with two, sums are rounded in another order, and so short a training ends at other accuracies.
demo: export OMP_NUM_THREADS := 1
demo: install
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "Training a small network on handwritten digits at several bit-widths, twice: about a minute on a CPU"
	@$(BIN)/papermill -k python3 --log-level ERROR --no-progress-bar --stdout-file - \
		notebooks/00_quickstart.ipynb $(DEMO)/00_quickstart.ipynb -p results_dir $(DEMO) 2> $(DEMO)/messages.txt \
		|| { cat $(DEMO)/messages.txt >&2; \
		echo "make demo: the notebook failed; what it did is in $(DEMO)/00_quickstart.ipynb" >&2; exit 1; }
	@echo
	@echo "The share of test images (%) that one network gets right, by the bits of each weight and activation"
	@echo; cat $(DEMO)/*/00_quickstart.md
	@echo "* trained at this bit-width; it was never trained at the others"
	@echo
	@echo "Figure: $$(ls $(DEMO)/*/00_quickstart.png)"
	@echo "Next:   $(BIN)/jupyter lab notebooks/00_quickstart.ipynb, which made this; README.md for your own network"

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
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Time to an accuracy is measured against another project's code, which is not ours to bring.
BENCHMARKS := $(filter-out %/common.py %/redraw.py $(if $(EMQ_ANY_PRECISION),,%/any_precision.py),$(sort $(wildcard benchmarks/*.py)))

bench: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[bench]"
	for benchmark in $(BENCHMARKS); do $(BIN)/python $$benchmark || exit 1; done

faults: install
	$(BIN)/python -m pytest -m thorough
	$(BIN)/python tests/project/faults.py

# What it has found is kept in mutants/; `.venv/bin/mutmut show NAME` shows a change.
mutants: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[mutants]"
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/mutmut results

# Pages link to one another as they do in this checkout. A warning, such as for a link that leads nowhere, is an error.
docs: install
	rm -rf build/docs && mkdir -p build/docs
	cp -r README.md GUIDE.md CONTRIBUTING.md CHANGELOG.md LICENSE docs notebooks results build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

figures: install
	$(BIN)/python -m emqlib.paper.plots
	$(BIN)/python benchmarks/redraw.py

# Executed notebooks lie beside the results. Those of `small` are committed, and so go to notebooks/ without the times that
# papermill notes, without progress bars (lines that end in a carriage return), without what goes to stderr, and without
# widgets, which only a running kernel can show. What a cell prints stays.
ONLY     ?= $(basename $(notdir $(sort $(wildcard notebooks/*.ipynb))))
EXECUTED := $(if $(filter smoke,$(PROFILE)),build/smoke/smoke,$(if $(filter small,$(PROFILE)),build/small,results/$(PROFILE)))
CLEAN    := import nbformat, sys; nb = nbformat.read(sys.argv[1], 4); [nb.metadata.pop(key, None) for key in ('papermill', 'widgets')]; \
	[cell.update(metadata={k: v for k, v in cell.metadata.items() if k == 'tags' and v}) for cell in nb.cells]; \
	[cell.update(outputs=[out for out in cell.outputs if out.get('name') != 'stderr' and '\r' not in out.get('text', '') \
	and 'application/vnd.jupyter.widget-view+json' not in out.get('data', {})]) for cell in nb.cells if 'outputs' in cell]; \
	nbformat.write(nb, sys.argv[2])

define EXECUTE
mkdir -p $(EXECUTED) && $(BIN)/papermill -k python3 notebooks/$(1).ipynb $(EXECUTED)/$(1).ipynb \
	$(if $(filter small,$(PROFILE)),&& $(BIN)/python -c "$(CLEAN)" $(EXECUTED)/$(1).ipynb notebooks/$(1).ipynb)
endef

results: install
	@$(MAKE) --no-print-directory -j $(JOBS) $(addprefix execute-,$(ONLY))

# One thread each, on which rows depend.
execute-%: export OMP_NUM_THREADS := 1
execute-%: export EMQ_PROFILE := $(PROFILE)
execute-%:
	$(call EXECUTE,$*)

execute-03_imagenet:
	@if [ $(PROFILE) = smoke ] || $(BIN)/python -c "import emqlib; emqlib.load_dataset('imagenet')" 2>/dev/null; \
	then $(call EXECUTE,03_imagenet); else echo "03_imagenet: not run, there is no ImageNet here (see GUIDE.md)"; fi

# Leaves .venv, which is gigabytes to install again.
clean:
	rm -rf build dist mutants *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage*
	find emqlib tests notebooks -name __pycache__ -prune -exec rm -rf {} +
