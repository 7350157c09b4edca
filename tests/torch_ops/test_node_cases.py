"""The specification's own cases, from the onnx package, for every operator that is supported."""

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from onnx_intq.graph import graph_from_model
from onnx_intq.torch_graph import TorchGraph
from onnx_intq.torch_ops import OPS
from onnx_intq.torch_ops.dtypes import tensor_from_numpy
from onnx_intq.transform import IntqError

MANY_NODES = "a function's body"
CONTROL = ["If", "Loop"]
NO_CASE = {"GlobalLpPool"}

REFUSED = {
    "attribute antialias": "no antialiasing",
    "attribute coordinate_transformation_mode": "no tf_crop_and_resize",
    "attribute training_mode": "inference only",
    "Dropout in training mode": "inference only",
    "cannot be run in torch": "an operator without a row",
    "has no torch form": "no strings, no 8-bit or 4-bit floats, no integers below 8 bits",
    "not implemented for 'UInt": "torch has no arithmetic on unsigned integers above 8 bits",
}
"""Part of an error -> why the case is out of reach."""

DIFFERENT = {
    # length_resized counts whole elements, as in onnxruntime; here scale times length is meant
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
}

SUB_BYTE = re.compile("to_U?INT[24]|test_quantizelinear_u?int[24]")
"""Cases that make 2- or 4-bit integers: torch would hold them in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of the specification with its inputs and outputs; tolerances are onnx's."""

    name: str
    model: onnx.ModelProto
    data: Sequence[tuple[Sequence[Any], Sequence[Any]]]
    rtol: float
    atol: float


@pytest.fixture(scope="session")
def cases() -> Mapping[str, list[Case]]:
    """All cases by operator; those of several nodes (mostly functions written out) together."""
    found = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases()
    for case in collected:
        assert case.model is not None
        operators = [node.op_type for node in case.model.graph.node]
        found[operators[0] if len(operators) == 1 else MANY_NODES].append(
            Case(
                name=case.name,
                model=case.model,
                data=case.data_sets or [],
                rtol=case.rtol,
                atol=case.atol,
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("operator", sorted({*OPS, *CONTROL, MANY_NODES} - NO_CASE))
def test_every_case_of_the_specification(cases: Mapping[str, list[Case]], operator: str) -> None:
    matched, unexplained = 0, {}
    for case in cases[operator]:
        if case.name in DIFFERENT or SUB_BYTE.search(case.name):
            continue
        try:
            check(case)
            matched += 1
        except IntqError as error:
            if not any(part in str(error) for part in REFUSED):
                unexplained[case.name] = str(error)
    assert unexplained == {}
    assert matched


def check(case: Case) -> None:
    net = TorchGraph(graph_from_model(case.model))
    for inputs, outputs in case.data:
        names = [value.name for value in case.model.graph.input]
        found = net(dict(zip(names, map(tensor, inputs), strict=False)))
        for value, stored in zip(case.model.graph.output, outputs, strict=True):
            have, want = found[value.name], tensor(stored)
            assert (have.shape, have.dtype) == (want.shape, want.dtype), case.name
            eps = torch.finfo(want.dtype).eps if want.is_floating_point() else 0
            rtol, atol = max(case.rtol, 4 * eps), max(case.atol, eps)
            np.testing.assert_allclose(have.double(), want.double(), rtol, atol, err_msg=case.name)


def tensor(value: Any) -> Tensor:
    array = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
    return tensor_from_numpy(np.asarray(array))
