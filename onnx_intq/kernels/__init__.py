"""Nonlinear functions in integers: the reference, which `onnx_intq.trace` turns into ONNX nodes.

A kernel takes integers q whose real value is q * scale (no zero point) and returns integers; where
the scale of the result is not asked for, it is returned, too. `mode` is "poly" (second-order
polynomials, fitted here), "paper" (I-BERT's published constants and range reduction) or "lut"
(tables over the integers of an 8-bit input).
"""
