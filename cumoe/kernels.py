"""The host side of every kernel: parameter structs, compile-time constants and launches.

One function makes a :class:`Launch` from arrays that an op has already checked; the parameter
structs are in ``params.py``. Nothing here validates or allocates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from cumoe.arrays import address, dtype_name, place_of
from cumoe.config import Activation, Array, Permutation
from cumoe.formulas import PARAMETERS
from cumoe.launch import (
    Device,
    KernelSpec,
    LaunchConfig,
    PreparedLaunch,
    get_device,
    get_kernel,
)
from cumoe.params import PARAMS
from cumoe.tuning import FP8_TENSOR, GroupedGemmConfig, GroupedGemmProblem, smem_bytes

TYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3, "uint8": 3, FP8_TENSOR: 4}
"""The DataType enum of types.cuh, by dtype name; a device holds fp8 as uint8."""

NO_TYPE = -1

SCALE_BLOCK = 128


class Runnable(Protocol):
    """What a stream runs: a launch, or what stands in a list of them without being a kernel."""

    def prepare(self, device: Device) -> Any:
        """Do ahead what needs no stream, if that has not been done; the device is current."""

    def run(self, device: Device, stream_ptr: int) -> None:
        """Queue it on a stream of the device, which is current."""


@dataclass
class Launch:
    """A kernel with its grid and parameters; parameters may be changed between runs.

    Parameters hold addresses. What `owned` holds lives as long as the launch.
    """

    spec: KernelSpec
    config: LaunchConfig
    params: np.ndarray
    owned: tuple[Array, ...] = ()
    _prepared: PreparedLaunch | None = None

    def prepare(self, device: Device) -> PreparedLaunch:
        """Load the kernel, if that has not been done; the device is current."""
        if self._prepared is None:
            config = self.config
            if device.compute_capability < (9, 0):
                config = replace(config, programmatic=False)
            kernel = get_kernel(self.spec, device)
            self._prepared = PreparedLaunch(kernel, config, self.params, device)
        return self._prepared

    def run(self, device: Device, stream_ptr: int) -> None:
        """Queue the launch on a stream of the device, which is current."""
        self.prepare(device).run(stream_ptr)


def make(
    spec: KernelSpec,
    grid: tuple[int, int, int],
    block: int,
    *,
    smem_bytes: int = 0,
    cluster: int = 1,
    **fields: Any,
) -> Launch:
    """Fill a kernel's parameter struct: arrays become addresses, dicts nested structs."""
    params = np.zeros((), PARAMS[spec.name])
    _fill(params, fields)
    # Programmatic launch hides the launch latency; every kernel waits for its inputs itself.
    config = LaunchConfig(
        grid,
        (block, 1, 1),
        cluster=(cluster, 1, 1) if cluster > 1 else None,
        smem_bytes=smem_bytes,
        programmatic=True,
    )
    return Launch(spec, config, params)


def _fill(params: np.ndarray, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            _fill(params[name], value)
        elif isinstance(value, np.ndarray) and params.dtype[name].shape == value.shape:
            params[name] = value  # a tensor map
        elif value is None or hasattr(value, "shape") and value.ndim > 0:
            params[name] = address(value)
        else:
            params[name] = value


def run(launches: Iterable[Runnable], like: Array) -> None:
    """Queue the launches on CuPy's current stream of the device that holds `like`."""
    import cupy

    ordinal = int(place_of(like).removeprefix("cuda:"))
    device = get_device(ordinal)
    with cupy.cuda.Device(ordinal):
        stream = cupy.cuda.get_current_stream().ptr
        for item in launches:
            item.run(device, stream)


def blocks(n: int) -> int:
    """Return how many 128-wide scale blocks cover `n` columns."""
    return -(-n // SCALE_BLOCK)


def scale_strides(scale: Array | None) -> tuple[int, int]:
    """Return the strides of scales in elements; 1-D ones are an expert's, or one for all."""
    if scale is None or scale.ndim == 1:
        return int(scale is not None and scale.size > 1), 0
    return scale.strides[0] // 4, scale.strides[1] // 4


def activation_fields(activation: Activation) -> dict[str, Any]:
    """Return the ActivationParams of activation.cuh."""
    given = {name: activation.value(name) for name in PARAMETERS}
    return {
        name: {"values" if hasattr(value, "shape") else "value": value}
        for name, value in given.items()
    }


def is_plain(activation: Activation) -> bool:
    """Tell whether an activation has a shorter expression, since it has no parameter."""
    given = (activation.alpha, activation.beta, activation.limit)
    return bool(activation.definition.plain) and all(value is None for value in given)


def with_activation(spec: KernelSpec, activation: Activation) -> KernelSpec:
    """Return a kernel of activation.cuh compiled for an activation; swiglu is the default there."""
    definition = activation.definition
    if is_plain(activation):
        define = ("ACTIVATION", str(definition.plain))
    elif activation.name == "swiglu":
        return spec
    else:
        define = ("ACTIVATION", definition.cuda)
    return replace(spec, defines=(*spec.defines, define))


@dataclass(frozen=True, eq=False)
class GemmOperand:
    """A grouped GEMM's weight as the kernel addresses it.

    Parameters
    ----------
    values : array, ``(num_local, num_rows, k)`` or, block-major, ``(num_local, k / bk, num_rows,
    bk)``
    scale : array or None, ``(num_local, scale_rows, blocks(k))``; tensors ``(num_local, halves)``
    num_rows, k : int
    block_major : bool
    gate_up_order : str or None
        Given when the rows are gate and up; scales are then in halves (see ExpertWeights).
    """

    values: Array
    scale: Array | None
    num_rows: int
    k: int
    block_major: bool
    gate_up_order: str | None = None

    def fields(self) -> dict[str, Any]:
        """Return the ``b`` fields of the parameters."""
        row_bytes = self.k * self.values.dtype.itemsize
        order, tensors = self.gate_up_order, self.scale is not None and self.scale.ndim == 2
        fields: dict[str, Any] = {
            "b": self.values,
            "b_scale": self.scale,
            "b_expert_bytes": self.num_rows * row_bytes,
            "b_row_bytes": 128 if self.block_major else row_bytes,
            "b_block_bytes": 128 * self.num_rows if self.block_major else 128,
            "b_scale_rows": 1 if tensors else blocks(self.num_rows),
            "gate_scale_row": 0,
            "row_step": 1,
            "k_bytes": row_bytes,
        }
        if order is not None:
            half = self.num_rows // 2
            half_scales = 1 if tensors else blocks(half)
            interleaved, gate_first = order.endswith("interleaved"), order.startswith("gate")
            second = 1 if interleaved else half
            fields |= {
                "row_step": 2 if interleaved else 1,
                "first_row": 0 if gate_first else second,
                "up_row": second if gate_first else 0,
                "b_scale_rows": 2 * half_scales,
                "gate_scale_row": 0 if gate_first else half_scales,
                "up_scale_row": half_scales if gate_first else 0,
            }
        return fields


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """What the first GEMM multiplies a token's products by, before the activation.

    Parameters
    ----------
    values : array, float32 or bfloat16, ``(num_tokens, columns)``; column 0 counts
    num_experts : int
        Local experts, the first ones, that do so: the routed.
    """

    values: Array
    num_experts: int

    def fields(self) -> dict[str, Any]:
        """Return the ``token_weights`` fields of the parameters."""
        return {
            "token_weights": self.values,
            "token_weights_columns": self.values.shape[1],
            "num_weighted": self.num_experts,
        }


def weights_type(problem: GroupedGemmProblem) -> int:
    """Return the DataType of the token weights, or kNoType."""
    return NO_TYPE if problem.weights_dtype is None else TYPES[problem.weights_dtype]


def grouped_gemm_spec(problem: GroupedGemmProblem, config: GroupedGemmConfig) -> KernelSpec:
    """Return the portable grouped GEMM for a problem and a configuration."""
    return KernelSpec(
        "sm80_grouped_gemm",
        (
            ("TYPE", TYPES[problem.dtype]),
            ("OUTPUT_TYPE", TYPES[problem.output_dtype]),
            ("WEIGHTS_TYPE", weights_type(problem)),
            ("GATED", int(problem.gated)),
            ("ACTIVATED", int(problem.gated or problem.activated)),
            ("GATHER", int(problem.gather)),
            ("BLOCK_M", config.block_m),
            ("BLOCK_N", config.block_n),
            ("NUM_STAGES", config.num_stages),
            ("WARPS_M", config.warps_m),
            ("WARPS_N", config.warps_n),
        ),
    )


def grouped_gemm(
    a: Array,
    a_scale: Array | None,
    operand: GemmOperand,
    out: Array,
    out_scale: Array | None,
    permutation: Permutation,
    problem: GroupedGemmProblem,
    config: GroupedGemmConfig,
    activation: Activation,
    token_weights: TokenWeights | None = None,
) -> Launch:
    """Launch for ``out[i] = epilogue(a[source(i)] @ w[e(i)].T)``."""
    n = out.shape[1]
    column_tiles = -(-n // config.block_n)
    a_row, a_block = scale_strides(a_scale)
    out_row, out_block = scale_strides(out_scale)
    spec = grouped_gemm_spec(problem, config)
    return make(
        with_activation(spec, activation) if problem.gated or problem.activated else spec,
        (permutation.max_tiles * column_tiles, 1, 1),
        config.num_threads,
        smem_bytes=smem_bytes(config, problem),
        a=a,
        a_scale=a_scale,
        out=out,
        out_scale=out_scale,
        token_idx=permutation.token_idx,
        tile_expert=permutation.tile_expert,
        tile_row_end=permutation.tile_row_end,
        num_tiles=permutation.num_tiles,
        a_scale_row_stride=a_row,
        a_scale_block_stride=a_block,
        out_scale_row_stride=out_row,
        out_scale_block_stride=out_block,
        n=n,
        num_column_tiles=column_tiles,
        activation=activation_fields(activation),
        **operand.fields(),
        **(token_weights.fields() if token_weights is not None else {}),
    )


def permute_rows(
    a: Array,
    permuted_idx: Array,
    out: Array,
    a_scale: Array | None = None,
    out_scale: Array | None = None,
) -> Launch:
    """Launch that copies each token's row, and its scales, to all its rows of the permutation."""
    row_bytes = a.shape[1] * a.dtype.itemsize
    num_pieces = -(-row_bytes // (128 * 4 * 16))
    row_stride, block_stride = scale_strides(a_scale)
    return make(
        KernelSpec("permute_rows"),
        (a.shape[0] * num_pieces, 1, 1),
        128,
        a=a,
        a_scale=a_scale,
        permuted_idx=permuted_idx,
        out=out,
        out_scale=out_scale,
        a_scale_row_stride=row_stride,
        a_scale_block_stride=block_stride,
        columns=permuted_idx.shape[1],
        row_bytes=row_bytes,
        num_blocks=0 if a_scale is None else a_scale.shape[1],
        num_pieces=num_pieces,
    )


def finalize(rows: Array, weights: Array | None, permuted_idx: Array, out: Array) -> Launch:
    """Launch for the weighted sum of each token's rows; weights of None are ones."""
    num_tokens, hidden_size = out.shape
    spec = KernelSpec(
        "finalize",
        (
            ("ROWS_TYPE", TYPES[dtype_name(rows)]),
            ("WEIGHTS_TYPE", TYPES["float32" if weights is None else dtype_name(weights)]),
            ("OUTPUT_TYPE", TYPES[dtype_name(out)]),
        ),
    )
    num_pieces = -(-hidden_size // (128 * 8))
    return make(
        spec,
        (num_tokens * num_pieces, 1, 1),
        128,
        rows=rows,
        weights=weights,
        permuted_idx=permuted_idx,
        out=out,
        columns=permuted_idx.shape[1],
        hidden_size=hidden_size,
        num_pieces=num_pieces,
    )
