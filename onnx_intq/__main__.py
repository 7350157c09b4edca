"""`python -m onnx_intq` is `onnx-intq`."""

from onnx_intq.cli import main

if __name__ == "__main__":
    main()
