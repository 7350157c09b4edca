# make demo: set up, then turn the embedded trained model into INT8 without data.   make test: all checks.
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test quick lint clean

demo: $(READY)
	$(BIN)/python tools/demo.py demo

test: $(READY) lint
	$(BIN)/coverage run -m pytest $(PYTEST)
	$(BIN)/coverage report

quick: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): setup.cfg constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cpu,speech,report,rtx,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
