"""What surrounds the Triton kernels of :mod:`bench.triton_stages`: configurations and launches.

A :class:`Stage` is one stage in Triton on the inputs of cumoe's call, with results of its own, all
of which are compared with cumoe's. torch and Triton are imported on use. On NumPy arrays the same
code runs in Triton's interpreter. Times nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bench.peers import as_torch, torch_stream
from bench.stage_checks import check_bf16, check_equal, check_fp4, check_fp8, check_scale
from cumoe import Quantized
from cumoe.config import Array
from cumoe.microscaling import FP4_GROUP, ue8m0_words

Kind = Literal["tile", "row", "flat", "part", "slots"]
"""How a kernel is divided into programs: tiles of whole groups, whole rows, the elements of all
rows, parts of a row, the last of which may be partial, or slots of tokens."""

MAX_PARTIALS = 1024
SCALE_BLOCK = 128


@dataclass(frozen=True)
class StageConfig:
    """Rows and columns of a program, and its warps."""

    rows: int
    columns: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.num_warps}"


CONFIGS: dict[Kind, tuple[StageConfig, ...]] = {
    "tile": (
        StageConfig(1, 512, 1),
        StageConfig(1, 1024, 2),
        StageConfig(2, 1024, 2),
        StageConfig(4, 1024, 4),
        StageConfig(8, 1024, 8),
        StageConfig(16, 128, 2),
    ),
    "row": tuple(StageConfig(1, 8192, num_warps) for num_warps in (4, 8, 16)),
    "flat": (
        StageConfig(1, 1024, 2),
        StageConfig(1, 2048, 4),
        StageConfig(1, 4096, 4),
        StageConfig(1, 4096, 8),
        StageConfig(1, 8192, 8),
    ),
    "part": (
        StageConfig(1, 512, 1),
        StageConfig(1, 512, 2),
        StageConfig(1, 1024, 2),
        StageConfig(1, 1024, 4),
        StageConfig(1, 2048, 8),
        StageConfig(1, 8192, 16),
    ),
    "slots": (
        StageConfig(1, 64, 1),
        StageConfig(1, 128, 1),
        StageConfig(1, 128, 2),
        StageConfig(1, 128, 4),
    ),
}
"""Candidates: 8 to 64 numbers a thread, held in registers; of slots, the warps select experts."""


def why_illegal(kind: Kind, config: StageConfig, width: int, group: int) -> str | None:
    """Return why a kernel cannot run with `config` on rows of `width`, or None if it can.

    Parameters
    ----------
    kind : {"tile", "row", "flat", "part", "slots"}
    config : StageConfig
    width : int
        Columns of a row.
    group : int
        Columns that share a scale; has a meaning for ``"tile"``.
    """
    for name, value in (("rows", config.rows), ("columns", config.columns)):
        if value < 1 or value & (value - 1):
            return f"{name} = {value} is no power of two"
    if kind != "tile" and config.rows != 1:
        return f"rows = {config.rows}: only tiles have several"
    if kind == "tile" and width % config.columns:
        return f"width = {width} is no multiple of columns = {config.columns}"
    if kind == "tile" and config.columns % group:
        return f"columns = {config.columns} is no multiple of the group of {group}"
    if kind == "row" and config.columns < width:
        return f"columns = {config.columns} is less than the row of {width}"
    return None


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage in Triton on one set of inputs.

    Attributes
    ----------
    kind : {"tile", "row", "flat", "part", "slots"}
    width, group : int
        As :func:`why_illegal` takes them.
    launch : callable
        Takes a StageConfig and returns what queues the kernels on torch's current stream.
    outputs : tuple of array
        What they write: integers, float32, or the bits of bfloat16.
    compare : callable
        Raises ArithmeticError if the outputs differ from cumoe's by more than rounding.
    launch_all : callable, optional
        What writes all that is compared, where that is more than what is timed.
    """

    kind: Kind
    width: int
    group: int
    launch: Callable[[StageConfig], Callable[[], Any]]
    outputs: tuple[Array, ...]
    compare: Callable[[], None]
    launch_all: Callable[[StageConfig], Callable[[], Any]] | None = None

    def candidates(self) -> list[StageConfig]:
        """Return the configurations that may run."""
        kind, width, group = self.kind, self.width, self.group
        return [c for c in CONFIGS[kind] if why_illegal(kind, c, width, group) is None]

    def run(self, config: StageConfig) -> Callable[[], None]:
        """Return what queues the stage on CuPy's current stream."""
        return _on_stream(self.launch(config))

    def check(self, config: StageConfig) -> None:
        """Poison the outputs, run the stage and compare.

        Raises
        ------
        ArithmeticError
            If a float32 scale is off by 1e-5, another scale at all, a number by more than one step
            of its format, or if something is not written.
        """
        for out in self.outputs:
            out[...] = np.nan if out.dtype.kind == "f" else np.iinfo(out.dtype).max >> 1
        _on_stream((self.launch_all or self.launch)(config))()
        self.compare()


def _on_stream(launch: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        with torch_stream():
            launch()

    return run


def _bits(x: Array) -> Array:
    return x.view(f"u{x.dtype.itemsize}")


def activation_stage(
    xp: Any, x: Array, x_scale: Array | None, out: Quantized, num_rows: int, held: Array
) -> Stage:
    """Return SwiGLU of gate and up to fp8 with a scale for each row and 128 columns.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    x : array, bfloat16 or fp8, shape (max_rows, 2 * size)
    x_scale : array, float32, shape (max_rows, 2 * size / 128), or None
    out : Quantized
        cumoe's result.
    num_rows : int
        Rows that are timed: the first, as if those that hold a token were packed.
    held : array, bool, shape (max_rows,)
        Rows that hold a token: they are compared.
    """
    from bench.triton_stages import activation

    max_rows, size = out.values.shape
    outputs = xp.empty(out.values.shape, np.uint8), xp.empty(out.scale.shape, np.float32)
    arrays = [as_torch(a) for a in (x, x_scale, *outputs)]

    def launch_rows(rows: int, config: StageConfig) -> Callable[[], Any]:
        grid = (-(-rows // config.rows) * (size // config.columns),)
        return lambda: activation[grid](
            *arrays,
            rows,
            FP8=x_scale is not None,
            WIDTH=size,
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.num_warps,
        )

    def compare() -> None:
        if bool(held.any()):
            check_scale(outputs[1][held], out.scale[held])
            check_fp8(xp, outputs[0][held], _bits(out.values)[held])

    return Stage(
        "tile",
        size,
        SCALE_BLOCK,
        lambda config: launch_rows(num_rows, config),
        outputs,
        compare,
        lambda config: launch_rows(max_rows, config),
    )


def finalize_stage(xp: Any, rows: Array, weights: Array, index: Array, out: Array) -> Stage:
    """Return the weighted sums of rows; `out`, bfloat16, is cumoe's result."""
    from bench.triton_stages import finalize

    (num_tokens, top_k), width = index.shape, out.shape[1]
    sums = xp.empty(out.shape, np.uint16)
    arrays = [as_torch(a) for a in (rows, weights, index, sums)]

    def launch(config: StageConfig) -> Callable[[], Any]:
        grid = (num_tokens * -(-width // config.columns),)
        return lambda: finalize[grid](
            *arrays, TOP_K=top_k, WIDTH=width, COLUMNS=config.columns, num_warps=config.num_warps
        )

    return Stage("part", width, 1, launch, (sums,), lambda: check_bf16(sums, _bits(out)))


def quantize_stage(xp: Any, variant: str, x: Array, out: Any) -> Stage:
    """Return a quantiser; there is none for swizzled scales.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    variant : str
        As :mod:`bench.bench_quantize` names it.
    x : array, bfloat16, shape (num_tokens, hidden_size)
    out : Quantized, QuantizedUE8M0 or QuantizedNVFP4
        cumoe's result; the source of a scale that is given.
    """
    name, *options = variant.split()
    static = "static" in options
    if name == "fp8_tensor":
        return _tensor_stage(xp, x, out, static)
    if name == "nvfp4":
        return _nvfp4_stage(xp, x, out, static)
    if name == "fp8_ue8m0":
        return _ue8m0_stage(xp, x, out)
    return _fp8_stage(xp, x, out, by_token=name == "fp8_token")


def _fp8_stage(xp: Any, x: Array, out: Quantized, *, by_token: bool) -> Stage:
    from bench.triton_stages import quantize_block, quantize_token

    num_rows, width = x.shape
    outputs = xp.empty(x.shape, np.uint8), xp.empty(out.scale.shape, np.float32)
    arrays = [as_torch(a) for a in (x, *outputs)]

    def launch(config: StageConfig) -> Callable[[], Any]:
        sizes = {"WIDTH": width, "COLUMNS": config.columns, "num_warps": config.num_warps}
        if by_token:
            return lambda: quantize_token[(num_rows,)](*arrays, **sizes)
        grid = _tiles(x, config)
        return lambda: quantize_block[grid](*arrays, num_rows, ROWS=config.rows, **sizes)

    def compare() -> None:
        check_scale(outputs[1], out.scale)
        check_fp8(xp, outputs[0], _bits(out.values))

    kind: Kind = "row" if by_token else "tile"
    return Stage(kind, width, SCALE_BLOCK, launch, outputs, compare)


def _ue8m0_stage(xp: Any, x: Array, out: Any) -> Stage:
    from bench.triton_stages import quantize_ue8m0

    (num_rows, width), group = x.shape, int(out.group_size)
    num_words, stride = ue8m0_words(x.shape, group)
    outputs = xp.empty(x.shape, np.uint8), xp.empty((num_words, stride, 4), np.uint8)
    tensors = [as_torch(a) for a in (x, *outputs)]
    tensors[2] = _as_bytes(tensors[2])

    def launch(config: StageConfig) -> Callable[[], Any]:
        grid = _tiles(x, config)
        return lambda: quantize_ue8m0[grid](
            *tensors,
            num_rows,
            stride,
            GROUP=group,
            WIDTH=width,
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.num_warps,
        )

    def compare() -> None:
        words = xp.ascontiguousarray(out.scale.T).view(np.uint8).reshape(num_words, num_rows, 4)
        scales = outputs[1][:, :num_rows], words
        got, want = (s.transpose(1, 0, 2).reshape(num_rows, -1) for s in scales)
        check_equal(got[:, : width // group], want[:, : width // group])
        check_fp8(xp, outputs[0], _bits(out.values))

    return Stage("tile", width, group, launch, outputs, compare)


def _tensor_stage(xp: Any, x: Array, out: Quantized, static: bool) -> Stage:
    from bench.triton_stages import quantize_tensor

    values, (scale, written) = xp.empty(x.shape, np.uint8), _total(xp, out.scale, static)
    maxima = xp.empty(MAX_PARTIALS, np.float32)
    arrays = [as_torch(a) for a in (x, values, scale, maxima)]

    def launch(config: StageConfig) -> Callable[[], Any]:
        first, partials = _amax(x, maxima, config, static)
        grid = (-(-x.size // config.columns),)

        def run() -> None:
            first()
            quantize_tensor[grid](
                *arrays,
                x.size,
                PARTIALS=partials,
                BLOCK=config.columns,
                num_warps=config.num_warps,
            )

        return run

    def compare() -> None:
        check_scale(scale, out.scale)
        check_fp8(xp, values, _bits(out.values))

    return Stage("flat", x.shape[1], 1, launch, (values, *written), compare)


def _nvfp4_stage(xp: Any, x: Array, out: Any, static: bool) -> Stage:
    from bench.triton_stages import quantize_nvfp4

    num_rows, width = x.shape
    values, scale = (xp.empty(a.shape, np.uint8) for a in (out.values, out.scale))
    total, written = _total(xp, out.global_scale, static)
    maxima = xp.empty(MAX_PARTIALS, np.float32)
    tensors = [as_torch(a) for a in (x, values, scale, total, maxima)]
    tensors[1] = _as_bytes(tensors[1])

    def launch(config: StageConfig) -> Callable[[], Any]:
        first, partials = _amax(x, maxima, config, static)
        grid = _tiles(x, config)

        def run() -> None:
            first()
            quantize_nvfp4[grid](
                *tensors,
                num_rows,
                PARTIALS=partials,
                WIDTH=width,
                ROWS=config.rows,
                COLUMNS=config.columns,
                num_warps=config.num_warps,
            )

        return run

    def compare() -> None:
        check_scale(total, out.global_scale)
        check_equal(scale, _bits(out.scale))
        check_fp4(xp, values, out.values)

    return Stage("tile", width, FP4_GROUP, launch, (values, scale, *written), compare)


def _tiles(x: Array, config: StageConfig) -> tuple[int]:
    num_rows, width = x.shape
    return (-(-num_rows // config.rows) * (width // config.columns),)


def _as_bytes(tensor: Any) -> Any:
    import torch

    return tensor.view(torch.uint8)


def _total(xp: Any, ours: Array, static: bool) -> tuple[Array, tuple[Array, ...]]:
    """Return the scale of the tensor, and it again among what the kernels write."""
    scale = xp.array(ours) if static else xp.empty(1, np.float32)
    return scale, () if static else (scale,)


def _amax(
    x: Array, maxima: Array, config: StageConfig, static: bool
) -> tuple[Callable[[], Any], int]:
    """Return the launch that finds partial maxima, and how many; nothing to do for a given scale.

    The number is a power of two: as many blocks as x has, :data:`MAX_PARTIALS` at most.
    """
    from bench.triton_stages import tensor_amax

    if static:
        return lambda: None, 0
    block = config.rows * config.columns
    blocks = -(-x.size // block)
    programs = min(MAX_PARTIALS, 1 << (blocks - 1).bit_length())
    passes = -(-blocks // programs)
    arrays = [as_torch(a) for a in (x, maxima)]
    launch = tensor_amax[(programs,)]
    return (
        lambda: launch(*arrays, x.size, PASSES=passes, BLOCK=block, num_warps=config.num_warps),
        programs,
    )
