"""Exact arithmetic of the twins: the exponential's recipe, the order of sums, selection order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cumoe.config import Routing
from cumoe.reference import exact, route

F32 = np.float32


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


def every_float(first: float, last: float, stride: int) -> np.ndarray:
    """Every `stride`-th float32 of one sign between two numbers, by bits."""
    low, high = (int(F32(v).view(np.uint32)) for v in (first, last))
    return np.arange(low, high + 1, stride, dtype=np.uint32).view(F32)


@pytest.mark.parametrize("last", [-105.0, 90.0])
def test_det_exp_is_within_one_ulp(last: float) -> None:
    x = every_float(math.copysign(0.0, last), last, 769)
    assert len(x) > 1_400_000
    y = exact.det_exp(x)
    assert y.dtype == F32
    want = np.exp(x.astype(np.float64))
    finite = np.isfinite(y)
    assert (want[~finite] > np.finfo(F32).max).all()
    ulp = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 24, -149))
    error = np.abs(y.astype(np.float64) - want)[finite] / ulp[finite]
    assert error.max() <= 1.0
    subnormal = (want[finite] < 2.0**-126) & (want[finite] > 2.0**-150)
    assert subnormal.any() == (last < 0) and not (y[finite][subnormal] == 0).any()
    steps = np.diff(y[finite])
    assert (steps <= 0).all() if last < 0 else (steps >= 0).all()


def test_det_exp_repeats_its_recipe() -> None:
    """Each step in float64 and then rounded: for one product or sum that is the float32 result."""

    def model(v: float) -> float:
        def f(z: float) -> float:
            return float(F32(z))

        h = float.fromhex
        v = min(max(v, -104.0), 89.0)
        n = float(np.rint(f(v * h("0x1.715476p+0"))))
        r = f(f(v - f(n * h("0x1.62e4p-1"))) - f(n * h("0x1.7f7d1cp-20")))
        p = h("0x1.6a504cp-10")
        for c in ("0x1.123974p-7", "0x1.5558acp-5", "0x1.555492p-3", "0x1.fffffcp-2"):
            p = f(f(p * r) + h(c))
        p = f(f(f(p * f(r * r)) + r) + 1.0)
        half = int(n) >> 1
        with np.errstate(over="ignore"):
            return f(f(p * 2.0**half) * 2.0 ** (int(n) - half))

    x = np.concatenate([every_float(-0.0, -105.0, 99_991), every_float(0.0, 90.0, 99_991)])
    want = np.array([model(float(v)) for v in x], F32)
    np.testing.assert_array_equal(bits(exact.det_exp(x)), bits(want))


def test_det_exp_at_the_ends() -> None:
    x = np.array(
        [0.0, -0.0, -103.97, -103.98, -1e30, -np.inf, np.nan, 88.722835, 88.73, np.inf], F32
    )
    want = [1, 1, 2.0**-149, 0, 0, 0, 0, None, np.inf, np.inf]
    for v, y, w in zip(x, exact.det_exp(x), want, strict=True):
        assert np.isfinite(y) if w is None else y == w, (v, y)
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(F32)
    assert exact.det_exp(nan).tolist() == [0] * 4
    # Pinned bits: a kernel holds the same recipe. The last two are not the nearest float32.
    x = np.array([-0.1, -1.0, -20.0, -87.5, -100.0, 1.0, 50.0, -5.853371, -1.7328277], F32)
    pinned = [0x3F67A36D, 0x3EBC5AB2, 0x310DA433, 0x006CB2BC, 0x0000001B, 0x402DF854, 0x638C881F,
              0x3B3C1A14, 0x3E3506D2]  # fmt: skip
    assert [hex(b) for b in bits(exact.det_exp(x))] == [hex(b) for b in pinned]


def test_sigmoid_is_exact_at_the_ends_and_close_between() -> None:
    x = np.concatenate([every_float(-0.0, -110.0, 9973), every_float(0.0, 110.0, 9973)])
    s = exact.sigmoid(x)
    assert s.dtype == F32
    want = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(s - want).max() <= 2.0**-23
    assert (s[x > 17.4] == 1).all() and (s[x < -17.4] == 0).all()
    assert ((s[np.abs(x) < 16] > 0) & (s[np.abs(x) < 16] < 1)).all()
    assert exact.sigmoid(np.array([np.inf, -np.inf, 0.0, -0.0], F32)).tolist() == [1, 0, 0.5, 0.5]


def slow_warp_sum(values: np.ndarray) -> np.float32:
    """Thirty-two lanes one by one, then the butterfly with all lanes kept."""
    lanes = []
    for lane in range(32):
        padded = [values[e] if e < len(values) else F32(0) for e in range(lane, lane + 2048, 32)]
        per_lane = padded[: -(-len(values) // 32)]
        total = per_lane[0]
        for v in per_lane[1:]:
            total = F32(total + v)
        lanes.append(total)
    for offset in (16, 8, 4, 2, 1):
        lanes = [F32(lanes[i] + lanes[i ^ offset]) for i in range(32)]
    assert len(set(lanes)) == 1
    return lanes[0]


@pytest.mark.parametrize("n", [1, 3, 31, 32, 33, 64, 96, 100, 160, 384, 2047, 2048])
def test_warp_sum_adds_in_lane_order(n: int, rng: np.random.Generator) -> None:
    values = rng.uniform(0, 1, (20, n)).astype(F32)
    want = np.array([slow_warp_sum(row) for row in values], F32)
    np.testing.assert_array_equal(bits(exact.warp_sum(values)), bits(want))
    if n >= 64:
        in_sequence = np.cumsum(values, axis=1, dtype=F32)[:, -1]
        assert (in_sequence != want).any(), "the order made no difference, so nothing was tested"


def test_weights_sum_in_column_order(rng: np.random.Generator) -> None:
    """Scalar float32 model of every normalised method: sums, divisions and scale bit for bit."""
    logits = (rng.standard_normal((64, 200)) * 2).astype(F32)
    reordered = 0
    for method in ("deepseek_v3", "minimax2", "renormalize", "renormalize_naive", "sigmoid_renorm"):
        routing = Routing(method, num_experts=200, top_k=32, scaling_factor=2.5)
        ids, weights = route(logits, routing)
        for row, chosen, got in zip(logits, ids, weights, strict=True):
            x = row[chosen]
            e = exact.sigmoid(x)
            if method.startswith("renormalize"):
                e = exact.det_exp(x - x[0])
            total, backwards = F32(0.0), F32(0.0)
            for k in range(32):
                total = F32(total + e[k])
                backwards = F32(backwards + e[31 - k])
            reordered += int(total != backwards)
            if method in ("deepseek_v3", "minimax2"):
                want = [F32(F32(v * F32(2.5)) / F32(total + F32(1e-20))) for v in e]
            else:
                want = [F32(F32(v / total) * F32(2.5)) for v in e]
            np.testing.assert_array_equal(bits(got), bits(np.array(want, F32)))
    assert reordered > 0, "the order of the sum made no difference, so nothing was tested"


def test_default_divides_by_the_warp_sum(rng: np.random.Generator) -> None:
    logits = (rng.standard_normal((32, 300)) * 2).astype(F32)
    e = exact.det_exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = e / np.array([slow_warp_sum(row) for row in e], F32)[:, None]
    ids, weights = route(logits, Routing("default", num_experts=300, top_k=32))
    want = np.take_along_axis(probabilities, ids, axis=1)
    np.testing.assert_array_equal(bits(weights), bits(want))


def test_order_image_is_the_selection_order() -> None:
    ascending = np.array([-np.inf, -3e38, -1, -1e-45, -0.0, 0.0, 1e-45, 1, 3e38, np.inf], F32)
    image = exact.order_image(ascending)
    assert image.dtype == np.uint32 and (np.diff(image.astype(np.int64)) > 0).all()
    assert image[0] == 0x007FFFFF
    np.testing.assert_array_equal(bits(exact.from_order_image(image)), bits(ascending))
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(F32)
    assert (exact.order_image(nan) == 0x007FFFFF).all()
