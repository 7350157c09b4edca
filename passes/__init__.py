"""The graph passes: one pass per file, named after the file, found by `onnx_intq.registry`."""

if __name__ != "onnx_intq.passes":
    raise ImportError("import onnx_intq.passes; a second copy of every pass would be loaded here")
