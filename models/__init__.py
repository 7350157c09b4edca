"""The model zoo in PyTorch, with NeMo's parameter names."""

if __name__ != "onnx_intq.models":
    raise ImportError("import onnx_intq.models; a second copy of every model would be loaded here")
