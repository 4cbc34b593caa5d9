"""Every activation against float64 formulas, alone, in GEMMs and layers; the user's own ones."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest

import cumoe
from cumoe import (
    Activation,
    ExpertWeights,
    Quantized,
    Routing,
    custom_activation,
    kernels_activation,
)
from cumoe import custom_activation as custom
from cumoe.config import check_choice
from cumoe.formulas import ACTIVATIONS
from cumoe.kernels_activation import (
    BLOCKS_PER_SM,
    GRID_PERCENT,
    MAX_WAVES,
    MIN_WAVES,
    UNITS_PER_BLOCK,
    activation_spec,
    select_rows,
)
from cumoe.launch import LaunchError
from cumoe.reference import activation as twin
from tests import brute_force
from tests.brute_force import random_layer
from tests.helpers import (
    BF16,
    DTYPES,
    FP8,
    Poisoned,
    assert_close_blocks,
    assert_same_bits,
    dequantized,
    each_backend,
    to_backend,
    to_host,
)

KINDS = [
    pytest.param("swiglu", {"alpha": 1.702, "beta": 1.0, "limit": 2.0}, id="swiglu"),
    pytest.param("situ", {"alpha": 4.0, "beta": 25.0}, id="situ"),
    pytest.param("situ", {"alpha": 0.5, "limit": 1.5}, id="situ limited"),
    *(pytest.param(name, {}, id=name) for name in ACTIVATIONS if name not in ("swiglu", "situ")),
]
each_kind = pytest.mark.parametrize(("kind", "values"), KINDS)
FLOATS = ("bfloat16", "float16", "float32")


def sides_of(kind):
    """Return how many values an activation takes."""
    return 2 if ACTIVATIONS[kind].gated else 1


class TestTwin:
    @each_kind
    def test_precision(self, kind, values):
        """Within float32 rounding of the formula in float64, also where the result is small."""
        gate = np.linspace(-9, 9, 2001, dtype=np.float32)
        up = np.linspace(3, -2, 2001, dtype=np.float32)
        gated = ACTIVATIONS[kind].gated
        got = twin.apply(gate if gated else None, up, Activation(kind, **values))
        assert got.dtype == np.float32
        wide = gate.astype(np.float64), up.astype(np.float64)
        want = brute_force.activate(kind, *wide, **values)
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-12)

    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_a_nan_stays_one(self, kind):
        gate, up = np.float32([np.nan, 1.0, 0.0]), np.float32([2.0, np.nan, 0.0])
        got = twin.apply(gate if ACTIVATIONS[kind].gated else None, up, Activation(kind))
        np.testing.assert_array_equal(np.isnan(got), [ACTIVATIONS[kind].gated, True, False])

    def test_large_values(self):
        x = np.float32([-np.inf, -1e30, 1e30, np.inf])
        relu2, identity = (twin.apply(None, x, Activation(k)) for k in ("relu2", "identity"))
        np.testing.assert_array_equal(relu2, np.float32([0, 0, np.inf, np.inf]))
        np.testing.assert_array_equal(identity, x)
        silu = twin.apply(None, x, Activation("silu"))
        np.testing.assert_array_equal(silu[1:], np.float32([0, 1e30, np.inf]))


class TestOps:
    @each_backend
    @each_kind
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", FP8.name])
    def test_activate(self, rng, backend, kind, values, dtype):
        sides = sides_of(kind)
        x = rng.standard_normal((21, sides * 144), np.float32) * 3
        halves = [half.copy() for half in np.split(x, sides, axis=1)]
        if dtype == FP8.name:
            parts = [cumoe.quantize_fp8_block(half) for half in halves]
            native = Quantized(
                np.concatenate([q.values for q in parts], 1),
                np.concatenate([q.scale for q in parts], 1),
            )
            wide = [dequantized(q) for q in parts]
        else:
            native = x.astype(DTYPES[dtype])
            wide = [half.astype(DTYPES[dtype]).astype(np.float64) for half in halves]
        want = brute_force.activate(kind, wide[0], wide[-1], **values)
        order = "gate_up" if sides == 2 else None
        for out_dtype in (*FLOATS, FP8.name):
            y = cumoe.activate(
                to_backend(native, backend),
                gate_up_order=order,
                activation=Activation(kind, **values),
                out_dtype=out_dtype,
            )
            got = dequantized(y) if isinstance(y, Quantized) else to_host(y)
            assert_close_blocks(got, want, out_dtype)

    @each_backend
    @pytest.mark.parametrize("size", [2880, 1408, 704, 224, 16])
    def test_one_bad_row_leaves_the_others_alone(self, rng, backend, size):
        """NaN, infinity, zeros and saturation; tails of 16 columns; padding is not written."""
        ids = np.stack([rng.permutation(5)[:2] for _ in range(40)]).astype(np.int32)
        ids[3] = -1
        p = cumoe.group(ids, num_experts=6, tile=16)
        x = rng.standard_normal((p.max_rows, 2 * size), np.float32)
        x[p.token_idx < 0] = np.nan
        rows = np.flatnonzero(p.token_idx >= 0)
        x[rows[1], 3], x[rows[2], 5], x[rows[4]] = np.nan, np.inf, 0
        x[rows[5], : size // 2] = 3e4
        good = np.setdiff1d(rows, rows[1:3])
        values = Poisoned((p.max_rows, size), FP8, backend)
        scale = Poisoned((p.max_rows, -(-size // 128)), np.float32, backend, column_major=True)
        out = Quantized(values.array, scale.array)
        cumoe.activate(
            to_backend(x, backend),
            gate_up_order="up_gate",
            permutation=to_backend(p, backend),
            out_dtype=FP8.name,
            out=out,
        )
        values.check_guards()
        scale.check_guards()
        got = to_host(out)
        want = brute_force.swiglu(*(x[good].astype(np.float64)[:, s] for s in _halves(size)))
        with np.errstate(invalid="ignore"):
            wide = dequantized(out)
        assert_close_blocks(wide[good], want, FP8.name)
        assert (got.values.view(np.uint8)[rows[1:3], :8] & 0x7F == 0x7F).any(axis=1).all()
        assert (got.scale[rows[4]] == np.finfo(np.float32).tiny).all()
        assert not (got.values.view(np.uint8)[rows[4]] & 0x7F).any()
        if backend == "cupy":
            padding = np.setdiff1d(np.arange(p.max_rows), rows)
            assert (got.values.view(np.uint8)[padding] == 0xFF).all()

    @each_backend
    @each_kind
    @pytest.mark.parametrize("dtype", ["bfloat16", FP8.name])
    def test_grouped_gemm(self, rng, backend, kind, values, dtype):
        ids = np.stack([rng.permutation(3)[:2] for _ in range(37)]).astype(np.int32)
        p = cumoe.group(ids, num_experts=4, tile=16)
        x = rng.standard_normal((37, 176), np.float32).astype(BF16)
        gate, up = rng.standard_normal((2, 4, 144, 176), np.float32) / np.float32(8)
        gated = ACTIVATIONS[kind].gated
        w = np.concatenate([gate, up], axis=1) if gated else up
        if dtype == FP8.name:
            native, weight = cumoe.quantize_fp8_block(x), _quantized_halves(w, 1 + gated)
            wide = dequantized(native)
            parts = [cumoe.quantize_fp8_block_weights(h) for h in (gate, up)]
            gate64, up64 = (cumoe.dequantize(q).astype(np.float64) for q in parts)
        else:
            native, weight, wide = x, w.astype(BF16), x.astype(np.float64)
            gate64, up64 = (h.astype(BF16).astype(np.float64) for h in (gate, up))
        rows = np.flatnonzero(p.token_idx >= 0)
        experts = np.searchsorted(p.expert_offsets, rows, side="right") - 1
        source = wide[p.token_idx[rows]]
        g, u = (np.einsum("rk,rnk->rn", source, w64[experts]) for w64 in (gate64, up64))
        want = brute_force.activate(kind, g, u, **values)
        for out_dtype in ("float32", dtype):
            y = cumoe.grouped_gemm(
                *(to_backend(a, backend) for a in (native, weight, p)),
                gate_up_order="gate_up" if gated else None,
                activation=Activation(kind, **values),
                out_dtype=out_dtype,
            )
            got = dequantized(y) if isinstance(y, Quantized) else to_host(y)
            assert_close_blocks(got[rows], want, out_dtype, experts=experts)

    @each_backend
    @pytest.mark.parametrize("recipe", ["bf16", "fp8_block"])
    @each_kind
    def test_layer(self, rng, backend, kind, values, recipe):
        routing = Routing("renormalize", num_experts=4, top_k=2, num_shared_experts=1)
        order = "up_gate" if ACTIVATIONS[kind].gated else "up"
        layer = random_layer(rng, routing, recipe, kind=kind, activation=values, order=order)
        inputs = (layer.x, layer.logits, layer.weights, layer.bias)
        x, logits, weights, bias = (to_backend(a, backend) for a in inputs)
        act = Activation(kind, **values)
        got = cumoe.moe(x, logits, weights, routing=routing, bias=bias, activation=act)
        assert_close_blocks(got, layer.run(), f"layer {recipe}")


def _halves(size):
    """Return gate and up columns of the order up_gate."""
    return slice(size, None), slice(0, size)


def _quantized_halves(w, sides):
    parts = [cumoe.quantize_fp8_block_weights(h.copy()) for h in np.split(w, sides, axis=1)]
    values = np.concatenate([q.values for q in parts], axis=1)
    scale = np.concatenate([q.scale for q in parts], axis=1)
    return Quantized(values, scale, block=(128, 128))


class TestRowsOfAUnit:
    def test_every_sm_stays_busy(self):
        """More rows only where they leave every SM its number of blocks."""
        for element_bytes, table in BLOCKS_PER_SM.items():
            chosen = [select_rows(n, 16, element_bytes, 132) for n in range(0, 120_000, 7)]
            assert chosen == sorted(chosen) and set(chosen) == set(table)
            for rows, num_rows in zip(chosen, range(0, 120_000, 7), strict=True):
                full = MIN_WAVES.get(rows, 0) * table[rows] * UNITS_PER_BLOCK * 132
                assert rows == 1 or -(-num_rows // rows) * 16 > full - UNITS_PER_BLOCK
        assert select_rows(1 << 20, 16, 1, 132) == 4
        assert select_rows(1 << 20, 16, 1, 132 * 10_000) == 1

    def test_blocks(self):
        """What there is work for, GRID_PERCENT of it where that fills the GPU, or MAX_WAVES."""
        x = np.zeros((1, 256), np.float32)
        resident = BLOCKS_PER_SM[4][1] * 4
        for blocks, grid in (
            (1, 1),
            (2 * resident, 2 * resident),
            (2 * resident + 1, -(-(2 * resident + 1) * GRID_PERCENT // 100)),
            (1000 * resident, MAX_WAVES * resident),
        ):
            rows = blocks * UNITS_PER_BLOCK
            item = kernels_activation.activation(
                np.broadcast_to(x, (rows, 256)), None,
                np.broadcast_to(x[:, :128], (rows, 128)), None, gate_up_order="gate_up",
                activation=Activation(), permutation=None, num_sms=4, rows=1,
            )  # fmt: skip
            assert item.config.grid == (grid, 1, 1)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [*FLOATS, FP8.name])
    def test_same_bits(self, rng, dtype):
        """The rows of a unit change nothing; neither do more blocks than units, nor one block."""
        from cumoe import kernels

        x = rng.standard_normal((1000, 2 * 704), np.float32) * 3
        scale = None
        if dtype == FP8.name:
            q = cumoe.quantize_fp8_block(x)
            x, scale = q.values, np.ascontiguousarray(q.scale[:, :12])
        values, x_scale = (to_backend(a, "cupy") for a in (x.astype(DTYPES[dtype]), scale))
        first = None
        for rows in BLOCKS_PER_SM[DTYPES[dtype].itemsize]:
            for num_sms in (1, 132, 10_000):
                out = Poisoned((1000, 704), FP8, "cupy")
                out_scale = Poisoned((1000, 6), np.float32, "cupy")
                item = kernels_activation.activation(
                    values, x_scale, out.array, out_scale.array, gate_up_order="gate_up",
                    activation=Activation(), permutation=None, num_sms=num_sms, rows=rows,
                )  # fmt: skip
                kernels.run([item], values)
                out.check_guards()
                out_scale.check_guards()
                got = to_host(out.array), to_host(out_scale.array)
                first = got if first is None else first
                for a, b in zip(got, first, strict=True):
                    assert_same_bits(a, b)


def clipped_product(gate, up, alpha, limit):
    """Return the twin of CLIPPED."""
    return np.minimum(gate * alpha, limit) * up


CLIPPED = "(gate * alpha > limit ? limit : gate * alpha) * up"


class TestCustom:
    @each_backend
    def test_everywhere(self, rng, backend):
        """In the op, in the GEMM and in a layer, with a parameter for each expert."""
        spread = np.linspace(0.5, 1.5, 5, dtype=np.float32)
        act = custom_activation(
            "clipped", cuda=CLIPPED, numpy=clipped_product, alpha=spread, limit=2.0
        )
        routing = Routing("renormalize", num_experts=5, top_k=2)
        layer = random_layer(rng, routing, "fp8_block")
        layer.activation = {"alpha": spread, "limit": 2.0}
        want = layer.run
        native = to_backend(act, backend)
        inputs = (layer.x, layer.logits, layer.weights, layer.bias)
        x, logits, weights, bias = (to_backend(a, backend) for a in inputs)
        with mock.patch(
            "tests.brute_force.activate",
            lambda kind, gate, up, alpha, limit: clipped_product(gate, up, alpha, limit),
        ):
            expected = want()
        got = cumoe.moe(x, logits, weights, routing=routing, bias=bias, activation=native)
        assert_close_blocks(got, expected, "layer fp8_block")
        rows = rng.standard_normal((9, 64), np.float32)
        y = cumoe.activate(
            to_backend(rows, backend),
            gate_up_order="gate_up",
            activation=dataclasses.replace(act, alpha=3.0),
            out_dtype="float32",
        )
        wide = rows.astype(np.float64)
        assert_close_blocks(y, clipped_product(wide[:, :32], wide[:, 32:], 3.0, 2.0), "float32")

    @each_backend
    def test_without_a_gate(self, rng, backend):
        act = custom_activation(
            "square", cuda="x * x  // of either sign", numpy=lambda x: x * x, gated=False
        )
        assert not act.gated and act.definition.cuda == "(x * x)"
        x = rng.standard_normal((5, 48), np.float32)
        y = cumoe.activate(to_backend(x, backend), activation=act, out_dtype="float32")
        assert_close_blocks(y, x.astype(np.float64) ** 2, "float32")

    def test_it_is_its_own_kernel(self):
        act = custom_activation("clipped", cuda=CLIPPED, numpy=clipped_product)
        spec = activation_spec("float32", "float32", act, gate_up_order="gate_up", rows=1)
        assert dict(spec.defines)["ACTIVATION"] == f"({CLIPPED})"
        assert (act.value("alpha"), act.value("limit"), act.beta) == (1.0, np.inf, None)
        with pytest.raises(
            ValueError, match="beta: expected None, since 'clipped' takes alpha and"
        ):
            dataclasses.replace(act, beta=1.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "swiglu"}, r"name: expected none of the built-in \['swiglu'"),
            ({"name": "my act"}, "name: expected an identifier, got 'my act'"),
            ({"cuda": " /* nothing */ "}, "cuda: expected a C.. expression, got nothing"),
            ({"cuda": "x * up"}, "cuda: expected gate and up with gated=True, got x"),
            ({"cuda": "gate * alpha"}, r"expected the parameters of the expression, \['alpha'\]"),
            ({"numpy": lambda gate, up, beta: gate}, r"\[\], got \['beta'\]"),
            ({"numpy": lambda gate, gamma: gate}, r"numpy: expected arguments among .*'gamma'"),
            ({"numpy": lambda gate: gate[:1]}, r"expected the shape of its arguments, \(64, 128\)"),
            ({"alpha": 2.0}, "activation.alpha: expected None, since 'mine' takes no parameter"),
            ({"cuda": "gate * up +"}, r"(?s)'gate \* up \+' does not compile:.*expected an expr"),
            ({"cuda": "gate * upp"}, '(?s)does not compile:.*identifier "upp" is undefined'),
        ],
    )
    def test_refused(self, options, message):
        good = {"name": "mine", "cuda": "gate * up", "numpy": lambda gate, up: gate * up}
        custom_activation(**good)
        with pytest.raises(ValueError, match=message):
            custom_activation(**good | options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cuda": 3}, "cuda: expected a C.. expression, got int"),
            ({"numpy": "gate * up"}, "numpy: expected a callable, got str"),
            ({"gated": 1}, "gated: expected a bool, got int"),
            ({"numpy": lambda gate, up: gate > up}, "expected floating point .* got bool"),
        ],
    )
    def test_wrong_types(self, options, message):
        good = {"name": "mine", "cuda": "gate * up", "numpy": lambda gate, up: gate * up}
        with pytest.raises(TypeError, match=message):
            custom_activation(**good | options)

    def test_without_nvrtc(self):
        """Nothing compiles, nothing is checked; NumPy arrays run the twin."""
        module = "cumoe.custom_activation.compile_cubin"
        with mock.patch(module, side_effect=LaunchError("not installed")):
            act = custom_activation("mine", cuda="no such", numpy=lambda gate, up: gate - up)
        x = np.arange(16, dtype=np.float32)[None]
        y = cumoe.activate(x, gate_up_order="gate_up", activation=act, out_dtype="float32")
        np.testing.assert_array_equal(y, np.full((1, 8), -8.0, np.float32))

    @pytest.mark.gpu
    def test_a_twin_that_differs_is_found(self, rng):
        wrong = custom_activation("mine", cuda="gate + up", numpy=lambda gate, up: gate - up)
        x = to_backend(rng.standard_normal((4, 16), np.float32), "cupy")
        with pytest.raises(ValueError, match="the kernel and the twin of 'mine' differ at"):
            cumoe.activate(x, gate_up_order="gate_up", activation=wrong)
        weights = ExpertWeights.from_experts(*np.ones((3, 2, 64, 64), np.float32)).to_device()
        logits = to_backend(np.ones((4, 2), np.float32), "cupy")
        with pytest.raises(ValueError, match="the kernel and the twin of 'mine' differ at"):
            cumoe.moe(
                to_backend(np.ones((4, 64), BF16), "cupy"),
                logits,
                weights,
                routing=Routing("top_k", num_experts=2, top_k=1),
                activation=wrong,
            )

    def test_compare(self):
        """Rounding passes; a wrong number, a wrong NaN and a wrong sign of infinity do not."""
        module = __import__("cumoe.custom_activation", fromlist=["compare"])
        act = custom_activation("mine", cuda="gate * up", numpy=lambda gate, up: gate * up)
        gate, up = module._sample(act.definition)
        with np.errstate(all="ignore"):
            right = gate * up
            module.compare(act, gate, up, right * np.float32(1 + 5e-5))
        assert np.isnan(right).any() and np.isinf(right).any() and (right == 0).any()
        infinite = tuple(np.argwhere(np.isinf(right))[0])
        for at, value in [((3, 5), 7.5), ((3, 5), np.nan), (infinite, -right[infinite])]:
            got = right.copy()
            got[at] = value
            with pytest.raises(ValueError, match=r"differ at 1 of 8192 values: gate = .*, up = "):
                module.compare(act, gate, up, got)
        nan = tuple(np.argwhere(np.isnan(right))[0])
        got = right.copy()
        got[nan] = 0
        with pytest.raises(ValueError, match="gives 0.0 by .* and nan by NumPy"):
            module.compare(act, gate, up, got)


def test_the_table_names_functions_that_exist():
    """Each built-in expression has a twin of the same name."""
    assert set(twin.TWINS) == set(ACTIVATIONS)
    for name in ACTIVATIONS:
        assert check_choice("activation", name, tuple(ACTIVATIONS)) == name
    assert custom is custom_activation
