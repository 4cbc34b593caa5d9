"""The cases of the activation kernel: each runs with every number of rows a unit can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cumoe import kernels, kernels_activation
from cumoe.arrays import DTYPES, FP8
from cumoe.config import Activation, ExpertShard, Permutation, Quantized
from cumoe.formulas import ActivationFormula
from cumoe.reference import activation as twin
from cumoe.reference import permutation as twin_permutation
from cumoe.reference import quantize
from tests.host.checks import (
    BF16,
    F16,
    F32,
    Case,
    Host,
    close,
    per_expert_activation,
    random_group,
    same_bits,
    valid_rows,
    virtual,
)

PRODUCT = Activation(
    "product", formula=ActivationFormula("(gate * up)", numpy=lambda gate, up: gate * up)
)
"""An activation of the user's, and one whose bits NumPy reproduces."""


def _wild(host: Host, shape: tuple[int, int]) -> np.ndarray:
    """Return numbers of all magnitudes; some rows hold NaN, infinities or nothing but zeros."""
    x = host.rng.standard_normal(shape) * np.exp2(host.rng.integers(-12, 8, shape))
    x = x.astype(np.float32)
    rows, columns = shape
    x[:, ::7] = np.where(x[:, ::7] < 0, np.float32(-0.0), np.float32(0.0))
    for row in range(1, rows, 8):
        x[row, min(5, columns - 1)], x[row, -1] = np.nan, np.inf
    x[2::8] = 0.0
    x[3::8] *= np.float32(1e25)
    x[4::8] *= np.float32(1e-25)
    x[5::8] = np.copysign(np.float32(1e-44), x[5::8])
    return x


def _midpoints(host: Host, shape: tuple[int, int]) -> np.ndarray:
    """Return numbers at and beside the midpoints of e4m3, for scales of all magnitudes."""
    rows, columns = shape
    codes = np.arange(0x7F, dtype=np.uint8).view(DTYPES[FP8]).astype(np.float32)
    middle = (codes[1:] + codes[:-1]) / 2
    x = np.empty(shape, np.float32)
    exponents = np.array([-125, -118, -100, -91, -90, -60, 0, 60, 99, 101, 110, 118])
    for row in range(rows):
        for start in range(0, columns, 128):
            scale = np.float32(1 + host.rng.random()) * np.exp2(exponents[row % 12], dtype="f4")
            near = (host.rng.choice(middle, 128) * scale).view(np.int32)
            near += host.rng.integers(-1, 2, 128).astype(np.int32)
            near = near.view(np.float32)
            near[0] = scale * np.float32(448)
            x[row, start : start + 128] = near[: columns - start]
    return x


def _shard(host: Host, num_tokens: int, tile: int) -> Permutation:
    """Return the permutation of a shard that holds 3 of 9 experts, and rows for few slots."""
    ids = host.rng.integers(-1, 9, (num_tokens, 4)).astype(np.int32)
    made = twin_permutation.group(ids, num_experts=9, tile=tile, shard=ExpertShard(4, 3))
    arrays = {n: host.arena.array(a) for n, a in made._asdict().items() if n != "tile"}
    return Permutation(**arrays, tile=tile)


def _hide(p: Permutation, walk: str) -> None:
    """Spoil what the kernel has no need of if it walks the slots, or the rows."""
    num_held = int(p.expert_offsets[-1])
    assert (p.permuted_idx.size <= num_held // 4 * 3) == (walk == "slots"), (
        "a case of the other walk"
    )
    if walk == "slots":
        p.token_idx[...] = -1
    else:
        p.permuted_idx[...] = p.max_rows
        p.token_idx[num_held:] = 0  # past the last expert's rows


def _inputs(host: Host, x: np.ndarray, dtype: str, sides: int) -> tuple[np.ndarray, Any]:
    """Return x in its dtype with the scales of its halves."""
    if dtype != FP8:
        with np.errstate(over="ignore"):
            return host.arena.array(x.astype(DTYPES[dtype])), None
    halves = [quantize.quantize_fp8_block(half) for half in np.split(x, sides, axis=1)]
    scale = np.concatenate([half.scale for half in halves], 1)
    column_major = host.arena.array(np.ascontiguousarray(scale.T)).T
    return host.arena.array(np.concatenate([half.values for half in halves], 1)), column_major


def _activation(
    columns: int,
    order: str | None,
    dtype: str,
    out_dtype: str,
    *,
    rows: int = 7,
    experts: int = 0,
    shard: bool = False,
    tile: int = 16,
    activation: Activation | None = None,
    wild: Callable[[Host, tuple[int, int]], np.ndarray] | None = None,
    num_sms: int = 1,
    walk: str = "slots",
) -> Callable[[Host], None]:
    """Compare with the twin, to the bit if `wild`; several experts have their own parameters."""

    def check(host: Host) -> None:
        p = random_group(host, rows, 3, experts, tile) if experts else None
        p = _shard(host, rows, tile) if shard else p
        num_rows = p.max_rows if p is not None else rows
        sides = 1 if order is None else 2
        shape = (num_rows, sides * columns)
        x = wild(host, shape) if wild else host.rng.standard_normal(shape).astype(np.float32) * 3
        held = np.arange(num_rows) if p is None else valid_rows(p)
        padding = np.setdiff1d(np.arange(num_rows), held)
        x[padding] = np.nan
        act = activation or Activation(alpha=1.7, limit=5.0)
        if p is not None and activation is None:
            act = per_expert_activation(host, len(p.tokens_per_expert))
        values, x_scale = _inputs(host, x, dtype, sides)
        expected = twin.activate(
            values,
            x_scale,
            gate_up_order=order,
            activation=act,
            permutation=p,
            out_dtype=out_dtype,
        )
        if p is not None:
            _hide(p, walk)
        first: Any = None
        for unit in kernels_activation.BLOCKS_PER_SM[values.dtype.itemsize]:
            y = host.empty((num_rows, columns), out_dtype)
            y_scale = None
            if out_dtype == FP8:
                y_scale = host.empty((num_rows, kernels.blocks(columns)), F32)
            launch = kernels_activation.activation(
                values,
                x_scale,
                y,
                y_scale,
                gate_up_order=order,
                activation=act,
                permutation=p,
                num_sms=num_sms,
                rows=unit,
            )
            host.run(launch)
            _compare(
                y[held],
                y_scale if y_scale is None else y_scale[held],
                expected,
                held,
                wild is not None,
            )
            assert (y[padding].view(np.uint8) == 0xFF).all(), "y: padding rows were written"
            words = y.view(f"u{y.dtype.itemsize}")
            first = words if first is None else first
            assert (words == first).all(), f"{unit} rows of a unit give other bits than 1"

    return check


def _compare(y: np.ndarray, y_scale: Any, expected: Any, held: np.ndarray, exact: bool) -> None:
    if y_scale is None:
        if exact:
            same_bits("y", y, expected[held])
        else:
            close("y", y, expected[held], y.dtype.name)
        return
    values, scale = expected.values[held], expected.scale[held]
    if exact:
        same_bits("scale", y_scale, scale)
        same_bits("values", y, values)
    else:
        close("scale", y_scale, scale, F32)
        got, want = (quantize.dequantize(Quantized(*q)) for q in ((y, y_scale), (values, scale)))
        close("y", got, want, FP8)


SCALES = (
    (0.03, 2.0),
    (2.0**-60, 2.0**50),
    (2.0**-100, 2.0**-20),
    (2.0**-80, 2.0**-80),
    (2.0**-140, 2.0**120),
    (2.0**30, 2.0**80),
    (2.0**90, 2.0**-60),
    (2.0**99, 2.0**-70),
    (2.0**102, 2.0**-70),
    (3e38, 1e-30),
    (2.0**100, 2.0**60),
    (-0.03, 2.0),
    (0.0, 1.0),
    (np.inf, 1.0),
    (1.0, np.inf),
    (np.nan, 1.0),
    (1.0, np.nan),
)
"""Of gate and up: usual ones, and those at which a product or a quotient leaves float32's range."""


def _scales_of_silu(host: Host) -> None:
    """Every row has scales of its own, and rows that are nothing but zeros follow each."""
    columns, rows = 272, 2 * len(SCALES)
    blocks = kernels.blocks(columns)
    codes = (
        host.rng.integers(0, 0x7F, (rows, 2 * columns))
        | host.rng.integers(0, 2, (rows, 2 * columns)) << 7
    )
    codes[1::2] &= 0x80
    values = host.arena.array(codes.astype(np.uint8).view(DTYPES[FP8]))
    scales = np.repeat(np.repeat(np.array(SCALES, F32), 2, axis=0), blocks, axis=1)
    x_scale = host.arena.array(scales)
    activation = Activation()
    with np.errstate(all="ignore"):
        expected = twin.activate(
            values,
            x_scale,
            gate_up_order="gate_up",
            activation=activation,
            permutation=None,
            out_dtype=FP8,
        )
    first: Any = None
    for unit in kernels_activation.BLOCKS_PER_SM[1]:
        y, y_scale = host.empty((rows, columns), FP8), host.empty((rows, blocks), F32)
        launch = kernels_activation.activation(
            values,
            x_scale,
            y,
            y_scale,
            gate_up_order="gate_up",
            activation=activation,
            permutation=None,
            num_sms=1,
            rows=unit,
        )
        host.run(launch)
        first = (y.copy(), y_scale.copy()) if first is None else first
        same_bits(f"values of {unit} rows", y.copy(), first[0])
        same_bits(f"scale of {unit} rows", y_scale.copy(), first[1])
        for row in range(rows):
            want = Quantized(expected.values[row : row + 1], expected.scale[row : row + 1])
            got = Quantized(y[row : row + 1].copy(), y_scale[row : row + 1].copy())
            name = f"scales {SCALES[row // 2]}, {unit} rows"
            if row % 2 or not np.isfinite(quantize.dequantize(want)).all():
                same_bits(f"scale of {name}", got.scale, want.scale)
                # The twin adds a beta of 0, which turns -0 into 0.
                same = (q.values.astype(F32) + np.float32(0) for q in (got, want))
                same_bits(f"values of {name}", *same)
                continue
            assert np.allclose(got.scale, want.scale, rtol=1e-6, atol=0), f"scale of {name}"
            amax = want.scale.max() * 448
            close(name, *(quantize.dequantize(q) / amax for q in (got, want)), FP8)


def _far(host: Host, permutation: Permutation | None = None) -> None:
    """Three rows of 2^30 columns, of which the first 2048 are visited: offsets to 6 * 2^30."""
    rows, size, visited = 3, 1 << 30, 2048
    blocks, seen = size // 128, visited // 128
    x, x_scale = virtual((rows, 2 * size), FP8), virtual((rows, 2 * blocks), F32)
    y, y_scale = virtual((rows, size), FP8), virtual((rows, blocks), F32)
    small = host.rng.standard_normal((rows, 2 * visited)).astype(np.float32)
    values, scale = _inputs(host, small, FP8, 2)
    for side in range(2):
        part = np.s_[:, side * visited : (side + 1) * visited]
        x[:, side * size : side * size + visited] = values[part]
        part = np.s_[:, side * seen : (side + 1) * seen]
        x_scale[:, side * blocks : side * blocks + seen] = scale[part]
    launch = kernels_activation.activation(
        x,
        x_scale,
        y,
        y_scale,
        gate_up_order="up_gate",
        activation=PRODUCT,
        permutation=permutation,
        num_sms=1,
        rows=1,
    )
    # One block of threads, whose 16 units are the first 2048 columns of one row after the other.
    launch.config = kernels.replace(launch.config, grid=(1, 1, 1))
    launch.params["group_step"], launch.params["block_step"] = 1, 0
    host.run(launch)
    expected = twin.activate(
        values,
        scale,
        gate_up_order="up_gate",
        activation=PRODUCT,
        permutation=None,
        out_dtype=FP8,
    )
    assert isinstance(expected, Quantized)
    same_bits("values", y[:, :visited], expected.values)
    same_bits("scale", y_scale[:, :seen], expected.scale)


def _far_slots(host: Host) -> None:
    """The same, walked in another order."""
    made = twin_permutation.group(np.array([[2], [0], [1]], np.int32), num_experts=3)
    assert made.permuted_idx.ravel().tolist() == [2, 0, 1]
    made.token_idx[...] = -1
    made.expert_offsets[-1] = 4
    arrays = {n: host.arena.array(a) for n, a in made._asdict().items() if n != "tile"}
    _far(host, Permutation(**arrays, tile=1))


ACTIVATION_CASES = [
    Case("halves", _activation(136, "gate_up", BF16, BF16)),
    Case("up first, float32", _activation(8, "up_gate", F32, F32, rows=1)),
    Case("interleaved", _activation(264, "gate_up_interleaved", F16, F16)),
    Case("interleaved up first", _activation(40, "up_gate_interleaved", BF16, F32, experts=5)),
    Case(
        "interleaved float32",
        _activation(72, "up_gate_interleaved", F32, BF16, activation=Activation()),
    ),
    Case("to fp8", _activation(208, "gate_up", BF16, FP8)),
    Case("fp8 to fp8, experts", _activation(144, "up_gate", FP8, FP8, experts=33)),
    Case("fp8 to fp8, odd tile", _activation(224, "gate_up", FP8, FP8, experts=4, tile=7)),
    Case("fp8 to bf16, 2880", _activation(2880, "gate_up", FP8, BF16, activation=Activation())),
    Case("1408", _activation(1408, "up_gate", FP8, FP8, rows=5, activation=Activation())),
    Case("704, several rounds", _activation(704, "up_gate", FP8, FP8, rows=70, num_sms=1)),
    Case(
        "hardly fewer slots than rows",
        _activation(208, "up_gate", FP8, FP8, experts=5, tile=1, walk="rows"),
    ),
    Case(
        "704, several rounds of slots",
        _activation(704, "up_gate", FP8, FP8, rows=70, experts=4, tile=128),
    ),
    Case("shard", _activation(272, "gate_up", FP8, FP8, rows=21, shard=True, walk="rows")),
    Case(
        "shard, several rounds",
        _activation(
            272, "gate_up", FP8, FP8, rows=150, shard=True, walk="rows", activation=Activation()
        ),
    ),
    Case("shard, slots", _activation(176, "gate_up", FP8, FP8, rows=21, shard=True, tile=64)),
    Case(
        "shard, slots, exact",
        _activation(
            272, "up_gate", BF16, BF16, rows=21, shard=True, tile=64, activation=PRODUCT, wild=_wild
        ),
    ),
    Case("exact", _activation(304, "up_gate", FP8, FP8, rows=17, activation=PRODUCT, wild=_wild)),
    Case(
        "exact, from float32",
        _activation(304, "gate_up", F32, FP8, rows=17, activation=PRODUCT, wild=_wild),
    ),
    Case(
        "exact, to bf16, experts",
        _activation(
            208, "gate_up", FP8, BF16, rows=17, experts=5, activation=PRODUCT, wild=_wild
        ),
    ),
    Case(
        "identity, float32 to fp8",
        _activation(400, None, F32, FP8, rows=24, activation=Activation("identity"), wild=_wild),
    ),
    Case(
        "relu2, fp8 to fp8",
        _activation(144, None, FP8, FP8, rows=24, activation=Activation("relu2"), wild=_wild),
    ),
    Case(
        "midpoints",
        _activation(
            272, None, F32, FP8, rows=48, activation=Activation("identity"), wild=_midpoints
        ),
    ),
    Case("silu", _activation(136, None, BF16, F32, activation=Activation("silu"))),
    Case("geglu", _activation(144, "gate_up", F32, F32, activation=Activation("geglu"))),
    Case("geglu_tanh", _activation(144, "up_gate", F32, F32, activation=Activation("geglu_tanh"))),
    Case(
        "situ",
        _activation(144, "gate_up", F32, F32, activation=Activation("situ", alpha=4, beta=25)),
    ),
    Case(
        "situ limited",
        _activation(48, "up_gate", F32, F32, activation=Activation("situ", limit=2)),
    ),
    Case("silu, scales", _scales_of_silu),
    Case("offsets past 2^32", _far),
    Case("offsets past 2^32, slots", _far_slots),
]  # fmt: skip
