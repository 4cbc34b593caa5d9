"""Bad input of the all-reduces: what is wrong is said before anything is launched or written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe import kernels_comm
from cumoe.comm import (
    AllReduced,
    Epilogue,
    Quantization,
    SingleGroup,
    allreduce,
    finalize_allreduce,
    reduce_allreduce,
)
from tests.helpers import BF16

X, W = np.ones((3, 32), BF16), np.ones(32, BF16)
ROWS, INDEX = np.ones((6, 32), BF16), np.zeros((3, 2), np.int32)
ONE = np.ones(1, np.float32)
GROUP = SingleGroup()
GOOD: dict[str, Any] = {"rows": ROWS, "topk_weights": None, "permuted_idx": INDEX}


def call(epilogue: Epilogue | None = None, group: Any = GROUP, **changed: Any) -> AllReduced:
    """Call finalize_allreduce with good arguments but for those given."""
    a = {**GOOD, **changed}
    rest = {k: v for k, v in a.items() if k not in GOOD}
    return finalize_allreduce(
        a["rows"], a["topk_weights"], a["permuted_idx"], group, epilogue=epilogue, **rest
    )


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "float32 rows": (
        lambda: call(rows=ROWS.astype(np.float32)),
        TypeError,
        "rows: expected dtype bfloat16 or float16",
    ),
    "odd width": (lambda: allreduce(np.ones((2, 12), BF16), GROUP), ValueError, "multiple of 8"),
    "no width": (lambda: allreduce(np.ones((2, 0), BF16), GROUP), ValueError, "x: expected 8 to"),
    "int64 index": (
        lambda: call(permuted_idx=INDEX.astype(np.int64)),
        TypeError,
        "permuted_idx: expected dtype int32",
    ),
    "no column": (lambda: call(permuted_idx=INDEX[:, :0].copy()), ValueError, "1 to 64 columns"),
    "65 columns": (
        lambda: call(permuted_idx=np.zeros((3, 65), np.int32)),
        ValueError,
        "1 to 64 columns, got 65",
    ),
    "weights of another shape": (
        lambda: call(topk_weights=np.ones((3, 3), np.float32)),
        ValueError,
        "topk_weights: expected shape",
    ),
    "integer weights": (
        lambda: call(topk_weights=INDEX),
        TypeError,
        "topk_weights: expected dtype",
    ),
    "factor": (lambda: call(routed_scaling_factor=np.nan), ValueError, "routed_scaling_factor"),
    "shared of another dtype": (
        lambda: call(shared_output=X.astype(np.float16)),
        TypeError,
        "shared_output: expected dtype bfloat16",
    ),
    "shared of another shape": (
        lambda: call(shared_output=X[:2]),
        ValueError,
        r"shared_output: expected shape \(3, 32\)",
    ),
    "residual of another dtype": (
        lambda: call(Epilogue(X.astype(np.float32))),
        TypeError,
        "epilogue.residual: expected dtype",
    ),
    "residual of another shape": (
        lambda: call(Epilogue(ROWS)),
        ValueError,
        r"epilogue.residual: expected shape \(3, 32\)",
    ),
    "norm weight": (
        lambda: call(Epilogue(X, W[:8])),
        ValueError,
        "epilogue.norm_weight: expected shape",
    ),
    "eps": (
        lambda: call(Epilogue(X, W, eps=-1.0)),
        ValueError,
        "epilogue.eps: expected at least 0",
    ),
    "offset": (
        lambda: call(Epilogue(X, W, weight_offset=np.inf)),
        ValueError,
        "epilogue.weight_offset",
    ),
    "no epilogue": (
        lambda: call(X),
        TypeError,
        "epilogue: expected an Epilogue or None, got ndarray",
    ),
    "no output": (lambda: call(outputs=()), ValueError, "outputs: expected at least one"),
    "no output array": (
        lambda: call(out=AllReduced()),
        ValueError,
        "outputs: expected at least one",
    ),
    "output that is not computed": (
        lambda: call(outputs=["norm"]),
        ValueError,
        r"outputs: expected some of \['sum'\], got 'norm'",
    ),
    "unknown output": (lambda: call(outputs=["mean"]), ValueError, "outputs: expected one of"),
    "outputs as a string": (lambda: call(outputs="sum"), TypeError, "expected a sequence of names"),
    "outputs and out": (
        lambda: call(outputs=["sum"], out=AllReduced(X)),
        ValueError,
        "outputs: expected None beside out",
    ),
    "out of another kind": (lambda: call(out=X), TypeError, "out: expected an AllReduced or None"),
    "out of another shape": (
        lambda: call(out=AllReduced(ROWS)),
        ValueError,
        "out.sum: expected shape",
    ),
    "out over an input": (
        lambda: call(Epilogue(X), shared_output=X, out=AllReduced(sum=X)),
        ValueError,
        "out.sum.*overlap",
    ),
    "one array for two outputs": (
        lambda: call(Epilogue(X), out=AllReduced(ROWS[:3], ROWS[:3])),
        ValueError,
        "overlap",
    ),
    "format": (lambda: Quantization("int8"), ValueError, "format: expected one of"),
    "no scale": (lambda: Quantization("fp8_tensor"), ValueError, "scale: expected the scale of"),
    "no global scale": (
        lambda: Quantization("nvfp4"),
        ValueError,
        "scale: expected the global scale of",
    ),
    "scale without use": (
        lambda: Quantization("fp8_block", ONE),
        ValueError,
        "scale: expected None",
    ),
    "group size": (
        lambda: Quantization("fp8_ue8m0", group_size=24),
        ValueError,
        "group_size: expected one of",
    ),
    "group that does not fit": (
        lambda: call(Epilogue(quantization=Quantization("fp8_ue8m0", group_size=64))),
        ValueError,
        "multiple of 64",
    ),
    "16 columns that do not fit": (
        lambda: allreduce(
            np.ones((2, 24), BF16),
            GROUP,
            epilogue=Epilogue(quantization=Quantization("nvfp4", ONE)),
        ),
        ValueError,
        "multiple of 16",
    ),
    "scale of another dtype": (
        lambda: call(Epilogue(quantization=Quantization("nvfp4", ONE.astype(np.float64)))),
        TypeError,
        "epilogue.quantization.scale",
    ),
    "quantised out of another kind": (
        lambda: call(Epilogue(quantization=Quantization("fp8_ue8m0")), out=AllReduced(quantized=X)),
        TypeError,
        "out.quantized: expected a QuantizedUE8M0",
    ),
    "quantised out of another block": (
        lambda: call(
            Epilogue(quantization=Quantization("fp8_token")),
            out=AllReduced(quantized=cumoe.quantize_fp8_block(X)),
        ),
        ValueError,
        r"out.quantized.block: expected \(1, None\)",
    ),
    "no workspace": (lambda: allreduce(X, None), TypeError, "workspace: expected a Workspace"),
    "no expert": (
        lambda: reduce_allreduce(X[None][:0], None, GROUP),
        ValueError,
        "at least one expert",
    ),
    "weights of experts": (
        lambda: reduce_allreduce(X[None], np.ones((3, 1), np.float32), GROUP),
        ValueError,
        "expert_weights: expected shape",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    run, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run()


class _Workspace(cumoe.comm.Workspace):
    """A workspace without memory."""

    def __init__(self, tokens: int, hidden: int, dtype: str = "bfloat16", closed: bool = False):
        self.group, self.max_num_tokens, self.hidden_size = GROUP, tokens, hidden
        self.dtype, self._closed, self.device = dtype, closed, 0
        self.debug = False


def test_workspace_that_does_not_fit():
    for workspace in (_Workspace(3, 32), _Workspace(4, 64), _Workspace(3, 16, "float32")):
        assert allreduce(X, workspace).sum.tobytes() == X.tobytes()
    for workspace in (_Workspace(2, 32), _Workspace(3, 24)):
        with pytest.raises(ValueError, match="workspace: expected room for 3 tokens of 64 bytes"):
            allreduce(X, workspace)
    with pytest.raises(ValueError, match="room for 3 tokens of 128 bytes"):
        allreduce(X.astype(np.float32), _Workspace(3, 32))
    with pytest.raises(ValueError, match="workspace: expected an open one, got a closed one"):
        allreduce(X, _Workspace(3, 32, closed=True))


def test_every_format_is_a_kernels():
    """The formats of the public description are those of the kernels."""
    formats = set(cumoe.comm.epilogue.FORMATS) | {"nvfp4_swizzled", None}
    assert formats == set(kernels_comm.QUANTS)
