"""Zero-shot INT8 and integer-only quantization of ONNX models, as small ordered graph passes."""

__version__ = "0.1.0"
