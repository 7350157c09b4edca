# make demo: set up, then turn the embedded trained model into INT8 without data.   make test: all checks.
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

# Threads that wait do not burn the processor: a shared machine would slow down tenfold.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test quick lint clean

DIGITS = models/pretrained/digits/manifest.json

demo: $(READY)
	mkdir -p demo
	$(BIN)/onnx-intq export digits -o demo/digits.onnx
	$(BIN)/onnx-intq synthesize demo/digits.onnx -o demo/feeds.npz --plot demo/spectrograms.png --real $(DIGITS)
	$(BIN)/onnx-intq quantize demo/digits.onnx -o demo/digits.int8.onnx
	$(BIN)/onnx-intq check demo/digits.int8.onnx --target ort
	$(BIN)/onnx-intq evaluate demo/digits.int8.onnx --manifest $(DIGITS) --against demo/digits.onnx
	$(BIN)/onnx-intq quantize demo/digits.int8.onnx --target integer -o demo/digits.integer.onnx
	$(BIN)/onnx-intq check demo/digits.integer.onnx --integer-only
	$(BIN)/onnx-intq compare demo/digits.int8.onnx demo/digits.integer.onnx --data $(DIGITS) --worst 3
	$(BIN)/onnx-intq bench demo/digits.onnx demo/digits.int8.onnx demo/digits.integer.onnx
	@echo "look at demo/spectrograms.png"

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
