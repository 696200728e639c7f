# medkit: `make run` for the results, `make test` for the proof. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
PY := .venv/bin/python
PARAMS ?= params/tiny.yaml
RUN ?= $(basename $(notdir $(PARAMS)))
export GOMP_SPINCOUNT = 20000
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help run test matrix rehearsal fuzz audit lab report lint format notebooks student-copy api browser readme bench ablation faults doctor size

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.venv/done: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	# torch's build for GPUs pins libraries of CUDA that its build for CPUs does not have: nothing to do for the latter
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock torch
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

run: .venv/done  ## weights and data, all six notebooks, results (PARAMS=… RUN=… to choose)
	$(PY) -m medkit run --params $(PARAMS) --run $(RUN)

test: .venv/done  ## unit, contract and smoke tests, then every notebook through nbval on what the smoke run trained
	export MEDKIT_SMOKE=$$(mktemp -d) && trap 'rm -rf "$$MEDKIT_SMOKE"' EXIT && \
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder tests && \
	$(PY) -m pytest -n auto --maxprocesses 7 --dist loadfile --no-loadscope-reorder \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks

fuzz: .venv/done  ## damaged and hostile inputs, new ones each time: about ten minutes
	HYPOTHESIS_PROFILE=long $(PY) -m pytest tests/fuzz

audit: .venv/done  ## known vulnerabilities of every locked package; needs PyPI itself, a mirror is not enough
	$(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

matrix: .venv/done  ## small profiles of every kind of data and model through all notebooks; a minute of one core each
	$(PY) -m pytest -n auto -m slow tests/smoke/test_matrix.py

rehearsal: .venv/done  ## gpu.yaml and paper.yaml on a CPU, with random weights, to the last cell: ten minutes each; npm once
	$(PY) -m pytest -m slow tests/smoke/test_rehearsal.py

browser: .venv/done  ## all notebooks in JupyterLab in Chromium, by Run All: as long as a smoke run
	$(PY) -m pytest -m slow tests/browser

lab: .venv/done  ## JupyterLab on notebooks/00_start.ipynb
	$(PY) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks/00_start.ipynb

report: .venv/done  ## print a run's results as markdown
	$(PY) -m medkit report --run $(RUN)

doctor: .venv/done  ## what this machine can do
	$(PY) -m medkit doctor

lint: .venv/done  ## ruff, over package, tests and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/done  ## ruff's fixes and layout
	$(PY) -m ruff check --fix --quiet .
	$(PY) -m ruff format --quiet .

notebooks: .venv/done  ## run the notebooks in place with the smoke profile, keep only checked outputs
	MEDKIT_OUTPUTS=$$(mktemp -d) .venv/bin/jupyter execute --inplace notebooks/[0-9]*.ipynb notebooks/labs/*.ipynb notebooks/solutions/*.ipynb
	.venv/bin/nbstripout --keep-count --keep-id notebooks/[0-9]*.ipynb notebooks/labs/*.ipynb notebooks/solutions/*.ipynb
	$(MAKE) student-copy

student-copy: .venv/done  ## notebooks/exercises: the solutions without the cells tagged `solution`
	.venv/bin/jupyter nbconvert --to notebook --output-dir notebooks/exercises --NbConvertApp.use_output_suffix=False \
		--ClearOutputPreprocessor.enabled=True --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_cell_tags=solution notebooks/solutions/*.ipynb

api: .venv/done  ## reference of the package as web pages: outputs/api/index.html
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/pdoc pdoc==16.0.0 markdown2==2.5.5
	PYTHONPATH=.venv/pdoc $(PY) -m pdoc --output-directory outputs/api medkit

readme: .venv/done  ## figure and tables of README and docs from a run's results (RUN=…)
	$(PY) -m medkit.reporting.readme outputs/$(RUN)/results.json
	$(PY) -m cogapp -r README.md docs/results.md docs/benchmarks.md docs/teaching.md docs/licences.md docs/glossary.md

bench: .venv/done  ## measurements beside their peers; results under benchmarks/results
	for module in $$(grep -l __main__ benchmarks/*/*.py | sed 's/\.py$$//' | tr / .); do \
		$(PY) -m $$module || failed="$$failed $$module"; done; \
	[ -z "$$failed" ] || { echo "not measured here:$$failed"; exit 1; }

ablation: .venv/done  ## what each part of distillation gives, on a finished run (RUN=…); three seeds take hours, each cell is kept
	$(PY) -m benchmarks.training.ablation --run outputs/$(RUN) --params $(PARAMS)

faults: .venv/done  ## kill a smoke run twenty times, and compare it with one that nothing disturbed; an hour, not in CI
	$(PY) -m tests.faults

size:  ## lines of the package by room, of tests and benchmarks, bytes of README, each with its goal
	@for room in medkit/*/; do printf '%6d  %s\n' $$(cat $$room*.py | wc -l) $$room; done
	@printf '%6d  %s\n' $$(cat medkit/*.py | wc -l) 'medkit/*.py'
	@printf '%6d  %s\n' $$(find medkit -name '*.py' -exec cat {} + | wc -l) 'medkit: at most 10500'
	@printf '%6d  %s\n' $$(find tests conftest.py -name '*.py' -exec cat {} + | wc -l) 'tests: at most 14000'
	@printf '%6d  %s\n' $$(find benchmarks -name '*.py' -exec cat {} + | wc -l) 'benchmarks: at most 2800'
	@printf '%6d  %s\n' $$(wc -c < README.md) 'bytes of README.md: at most 6000'
