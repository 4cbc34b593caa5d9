"""Routing twin: golden examples, an independent float64 brute force, ties, NaN, and exact bits."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumoe.config import PackedTopK, Routing, RoutingMethod, TopK
from cumoe.reference import exact, pack, route, unpack
from cumoe.reference.routing import _mask_groups, _selection_keys

F32, BF16 = np.float32, np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(F32)
METHODS = list(RoutingMethod)
BIASED = (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)
SIGMOID_KEYS = (*BIASED, RoutingMethod.SIGMOID, RoutingMethod.SIGMOID_RENORM)
SOFTMAX_SELECTED = (RoutingMethod.RENORMALIZE, RoutingMethod.RENORMALIZE_NAIVE)
UNSCALED = [m for m in METHODS if m not in BIASED]
GAP = 1e-4
"""Least distance between keys, and between group scores, of a row without ties."""

HALF_ULP = 2.0**-24
SIGMOID_ERROR = 2.0**-23
"""Absolute error of the float32 sigmoid: its tanh form loses relative accuracy below one half."""

SETTINGS = settings(deadline=None, derandomize=True, max_examples=150)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint16 if x.dtype == BF16 else np.uint32)


def assert_same(a: TopK, b: TopK) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    assert a.weights.dtype == b.weights.dtype
    np.testing.assert_array_equal(bits(a.weights), bits(b.weights))


def make(method: RoutingMethod | str, num_experts: int, top_k: int, **options: Any) -> Routing:
    """Build a Routing, with the one column that llama4 wants."""
    top_k = 1 if RoutingMethod(method) is RoutingMethod.LLAMA4 else min(top_k, num_experts)
    return Routing(method, num_experts=num_experts, top_k=top_k, **options)


def logistic(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v))


def oracle_keys(row: list[float], method: RoutingMethod | str, bias: list[float]) -> list[float]:
    """Keys in float64. Softmax keeps the order of the logits, so ``default`` needs none of it."""
    if method in BIASED:
        return [logistic(v) + b for v, b in zip(row, bias, strict=True)]
    return [logistic(v) for v in row] if method in SIGMOID_KEYS else row


def oracle_groups(keys: list[float], routing: Routing) -> list[float]:
    size = routing.num_experts // routing.num_groups
    groups = [sorted(keys[g : g + size])[::-1] for g in range(0, routing.num_experts, size)]
    return [best[0] + best[1] if size > 1 else -math.inf for best in groups]


def oracle_ids(keys: list[float], routing: Routing) -> list[int]:
    candidates = list(range(routing.num_experts))
    if routing.num_groups > 1:
        scores = oracle_groups(keys, routing)
        best = sorted(range(len(scores)), key=lambda g: (-scores[g], g))[: routing.top_groups]
        size = routing.num_experts // routing.num_groups
        candidates = [e for e in candidates if e // size in best]
    return sorted(candidates, key=lambda e: (-keys[e], e))[: routing.top_k]


def oracle_weights(
    row: list[float], ids: list[int], routing: Routing
) -> tuple[list[float], list[float]]:
    """Float64 weights and how far float32 may be from each."""
    method, x = routing.method, [row[e] for e in ids]
    scale = float(F32(routing.scaling_factor))
    if method is RoutingMethod.TOP_K:
        return [v * scale for v in x], [abs(v * scale) * HALF_ULP for v in x]
    if method is RoutingMethod.DEFAULT or method in SOFTMAX_SELECTED:
        everything = row if method is RoutingMethod.DEFAULT else x
        largest = max(everything)
        total = math.fsum(math.exp(v - largest) for v in everything)
        w = [math.exp(v - largest) / total * scale for v in x]
        additions = 5 + math.ceil(len(row) / 32) if method is RoutingMethod.DEFAULT else len(x)
        # x - m is rounded at magnitude up to 8, exp to 1 ulp; then a sum, a division, a scale.
        return w, [abs(v) * (8 + 4 + additions) * HALF_ULP for v in w]
    s = [logistic(v) for v in x]
    if method in BIASED or (
        method is RoutingMethod.SIGMOID_RENORM and routing.normalize is not False
    ):
        total = math.fsum(s) + 1e-20
        relative = [
            SIGMOID_ERROR / v + len(s) * SIGMOID_ERROR / total + (len(s) + 3) * HALF_ULP for v in s
        ]
        w = [v * scale / total for v in s]
        return w, [abs(v) * r for v, r in zip(w, relative, strict=True)]
    return [v * scale for v in s], [abs(scale) * SIGMOID_ERROR for _ in s]


def check_against_oracle(logits: np.ndarray, routing: Routing, bias: np.ndarray | None) -> None:
    """Compare ids exactly, fp32 weights to the stated error, bf16 weights to one rounding."""
    result = route(logits, routing, bias=bias)
    rounded = np.zeros(routing.num_experts) if bias is None else bias.astype(np.float64)
    if routing.bias_round_bf16:
        rounded = rounded.astype(F32).astype(BF16).astype(np.float64)
    shared = range(routing.num_experts, routing.total_experts)
    assert result.ids.dtype == np.int32
    assert result.ids.shape == result.weights.shape == (len(logits), routing.total_top_k)
    for row, ids, weights in zip(logits.astype(np.float64).tolist(), *result, strict=True):
        keys = oracle_keys(row, routing.method, rounded.tolist())
        expected = oracle_ids(keys, routing)
        assert ids.tolist() == [*expected, *shared]
        want, error = oracle_weights(row, expected, routing)
        if routing.weights_dtype == "bfloat16":
            # Half a bf16 ulp for the rounding itself; one ulp in all is the acceptance bound.
            error = [e + abs(w) * 2.0**-8 for e, w in zip(error, want, strict=True)]
        for k, (w, e) in enumerate(zip(want, error, strict=True)):
            assert abs(float(weights[k]) - w) <= e, (k, float(weights[k]), w, e)
        assert (weights[routing.top_k :].astype(F32) == 1.0).all()


def tie_free_rows(
    rng: np.random.Generator,
    num_tokens: int,
    routing: Routing,
    bias: np.ndarray | None,
    dtype: np.dtype = FLOAT32,
) -> np.ndarray:
    """Draw logits in [-3, 3] whose keys and group scores are at least GAP apart.

    float32 logits of biased methods are solved for from spaced keys, so any size works.
    """
    num_experts, rows = routing.num_experts, []
    offset = np.zeros(num_experts) if bias is None else bias.astype(np.float64)
    if routing.bias_round_bf16:
        offset = offset.astype(F32).astype(BF16).astype(np.float64)
    for _ in range(400 * num_tokens):
        places = (rng.permutation(num_experts) + rng.uniform(0.4, 0.6, num_experts)) / num_experts
        if routing.method in BIASED and dtype == F32:
            s = offset.mean() + 0.25 + 0.5 * places - offset
            row = np.log(s / (1 - s))
        elif dtype == F32:
            row = 6 * places - 3
        else:
            row = rng.choice(np.arange(-192, 193), num_experts, replace=False) / 64
        row = row.astype(dtype)
        keys = oracle_keys(row.astype(np.float64).tolist(), routing.method, offset.tolist())
        gaps = [np.diff(np.sort(keys))]
        if routing.num_groups > 1 and num_experts > routing.num_groups:
            gaps.append(np.diff(np.sort(oracle_groups(keys, routing))))
        if all((gap > GAP).all() for gap in gaps):
            rows.append(row)
        if len(rows) == num_tokens:
            return np.array(rows)
    raise AssertionError("no rows without ties found")


# --- golden examples ---------------------------------------------------------------------------

L1_X = np.array([[0.5, -0.25, 1.0, 0.75, -1.0, 2.0, 0.25, 0.0]], F32)
L1_BIAS = np.array([0.10, 0.30, -0.20, 0.00, 0.40, -0.60, 0.20, 0.20], F32)


def test_golden_deepseek_v3_grouped() -> None:
    routing = Routing(
        "deepseek_v3", num_experts=8, top_k=2, num_groups=4, top_groups=2, scaling_factor=2.5,
        bias_round_bf16=True,
    )  # fmt: skip
    sigma = [0.622459, 0.437823, 0.731059, 0.679179, 0.268941, 0.880797, 0.562177, 0.5]
    np.testing.assert_allclose(exact.sigmoid(L1_X)[0], sigma, rtol=0, atol=1e-6)
    keys = _selection_keys(L1_X, RoutingMethod.DEEPSEEK_V3, L1_BIAS, True)
    expected = [0.722557, 0.738605, 0.530863, 0.679179, 0.669332, 0.279235, 0.762372, 0.700195]
    np.testing.assert_allclose(keys[0], expected, rtol=0, atol=1e-6)
    scores = oracle_groups(keys[0].tolist(), routing)
    np.testing.assert_allclose(scores, [1.461162, 1.210042, 0.948567, 1.462567], rtol=0, atol=2e-6)
    assert np.flatnonzero(_mask_groups(exact.order_image(keys), 4, 2)[0]).tolist() == [0, 1, 6, 7]

    ids, weights = route(L1_X, routing, bias=L1_BIAS)
    assert ids.tolist() == [[6, 1]]
    np.testing.assert_allclose(weights, [[1.405441, 1.094559]], rtol=0, atol=1e-6)

    shared = make(
        "deepseek_v3", 8, 2, num_groups=4, top_groups=2, scaling_factor=2.5, bias_round_bf16=True,
        num_shared_experts=1, weights_dtype="bfloat16",
    )  # fmt: skip
    topk = route(L1_X, shared, bias=L1_BIAS)
    assert topk.ids.tolist() == [[6, 1, 8]]
    assert bits(topk.weights).tolist() == [[0x3FB4, 0x3F8C, 0x3F80]]
    assert pack(topk).packed.tolist() == [[0x00063FB4, 0x00013F8C, 0x00083F80]]


def test_golden_packing() -> None:
    ids = np.array([[3, 3]], np.int32)
    packed = pack(TopK(ids, np.array([[0.5, -0.5]], F32))).packed
    assert packed.dtype == np.int32 and packed.tolist() == [[0x00033F00, 0x0003BF00]]
    back = unpack(PackedTopK(packed))
    assert back.ids.tolist() == [[3, 3]] and back.weights.tolist() == [[0.5, -0.5]]


# --- float64 brute force -----------------------------------------------------------------------


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, dict[str, Any]]:
    method = draw(st.sampled_from(METHODS))
    logits_dtype = draw(st.sampled_from([np.dtype(F32), BF16]))
    size = draw(st.integers(1, 12 if logits_dtype == BF16 else 64))
    groups = draw(st.integers(1, 8)) if method is RoutingMethod.DEEPSEEK_V3 else 1
    top_groups = draw(st.integers(1, groups))
    num_experts = size * groups
    top_k = draw(st.integers(1, min(32, size * top_groups)))
    options: dict[str, Any] = {
        "num_groups": groups,
        "top_groups": top_groups,
        "scaling_factor": draw(st.sampled_from([1.0, 2.5, 0.3, -1.5])),
        "num_shared_experts": draw(st.integers(0, 3)),
        "weights_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "bias_round_bf16": draw(st.booleans()),
    }
    if method is RoutingMethod.SIGMOID_RENORM:
        options["normalize"] = draw(st.sampled_from([None, True, False]))
    bias_dtype = draw(st.sampled_from([None, np.dtype(F32), BF16]))
    inputs = {
        "num_tokens": draw(st.integers(1, 4)),
        "logits_dtype": logits_dtype,
        "bias_dtype": bias_dtype,
        "bias_center": draw(st.sampled_from([0.0, -1.25, 0.75])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    return make(method, num_experts, top_k, **options), inputs


@SETTINGS
@given(routings())
def test_matches_float64(case: tuple[Routing, dict[str, Any]]) -> None:
    routing, inputs = case
    rng = np.random.default_rng(inputs["seed"])
    bias = None
    if inputs["bias_dtype"] is not None:
        bias = inputs["bias_center"] + rng.uniform(-0.2, 0.2, routing.num_experts)
        bias = bias.astype(inputs["bias_dtype"])
    logits = tie_free_rows(rng, inputs["num_tokens"], routing, bias, inputs["logits_dtype"])
    check_against_oracle(logits, routing, bias)


@pytest.mark.parametrize("num_experts", [1, 3, 33, 96, 160, 384, 512, 2048])
@pytest.mark.parametrize("method", METHODS)
def test_matches_float64_at_every_size(
    method: RoutingMethod, num_experts: int, rng: np.random.Generator
) -> None:
    bias = rng.uniform(-0.2, 0.2, num_experts).astype(F32)
    for top_k in (1, 8, 22, 32):
        if top_k <= num_experts:
            routing = make(method, num_experts, top_k, num_shared_experts=1)
            check_against_oracle(tie_free_rows(rng, 2, routing, bias), routing, bias)


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_groups", "top_k"),
    [(256, 8, 4, 8), (128, 4, 2, 4), (96, 1, 1, 8), (512, 1, 1, 22), (384, 1, 1, 8),
     (160, 1, 1, 8), (72, 1, 1, 6), (2048, 16, 3, 32)],
)  # fmt: skip
@pytest.mark.parametrize("center", [0.0, -1.25])
def test_deepseek_models(
    num_experts: int,
    num_groups: int,
    top_groups: int,
    top_k: int,
    center: float,
    rng: np.random.Generator,
) -> None:
    """With a negative bias every key is negative: what is masked must rank below all of them."""
    routing = make(
        "deepseek_v3", num_experts, top_k, num_groups=num_groups, top_groups=top_groups,
        scaling_factor=2.5, num_shared_experts=1,
    )  # fmt: skip
    bias = (center + rng.uniform(-0.2, 0.2, num_experts)).astype(F32)
    logits = tie_free_rows(rng, 6, routing, bias)
    keys = exact.sigmoid(logits) + bias
    assert center == 0.0 or (keys < 0).all()
    check_against_oracle(logits, routing, bias)


# --- ties, zeros, NaN and infinities -----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@SETTINGS
@given(st.integers(1, 100), st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_ties_go_to_the_lower_id(
    method: RoutingMethod, num_experts: int, top_k: int, seed: int
) -> None:
    routing = make(method, num_experts, top_k)
    logits = np.random.default_rng(seed).integers(-2, 3, (3, num_experts)).astype(F32)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, : routing.top_k]
    np.testing.assert_array_equal(route(logits, routing).ids, expected)


def test_tied_groups_go_to_the_lower_group() -> None:
    routing = make("deepseek_v3", 12, 4, num_groups=4, top_groups=2)
    logits = np.tile(np.array([0.0, 1.0, -1.0], F32), 4)[None]
    assert route(logits, routing).ids.tolist() == [[1, 4, 0, 3]]
    # One group beats the rest; of the three tied ones the first joins it.
    logits[0, 9:] += 1
    assert route(logits, routing).ids.tolist() == [[10, 1, 9, 0]]


def test_group_of_one_has_no_second_key() -> None:
    """Its score is key + -inf, the same for every group, so the first groups win."""
    routing = make("deepseek_v3", 4, 2, num_groups=4, top_groups=2)
    assert route(np.array([[0, 1, 2, 3]], F32), routing).ids.tolist() == [[1, 0]]


def test_group_score_is_of_two_experts() -> None:
    """One outstanding expert does not carry a group whose second is poor."""
    routing = make("deepseek_v3", 6, 2, num_groups=2, top_groups=1)
    logits = np.array([[9, -9, -9, 1, 1.5, -9]], F32)
    assert route(logits, routing).ids.tolist() == [[4, 3]]


@pytest.mark.parametrize("method", METHODS)
def test_negative_zero_ranks_below_zero(method: RoutingMethod) -> None:
    """Where the key is the logit itself; sigmoid and softmax make the two equal."""
    logits = np.array([[-1.0, -0.0, 0.0, -0.0]], F32)
    first = route(logits, make(method, 4, 1)).ids[0, 0]
    assert first == (1 if method in SIGMOID_KEYS or method is RoutingMethod.DEFAULT else 2)


def test_saturated_sigmoids_tie_but_their_logits_do_not() -> None:
    logits = np.array([[20.0, 30.0, 25.0, 1.0]], F32)
    ids, weights = route(logits, make("sigmoid", 4, 3))
    assert ids.tolist() == [[0, 1, 2]] and weights.tolist() == [[1, 1, 1]]
    ids, weights = route(logits, make("top_k_sigmoid", 4, 3))
    assert ids.tolist() == [[1, 2, 0]] and weights.tolist() == [[1, 1, 1]]
    ids, weights = route(-logits, make("sigmoid", 4, 4))
    assert ids.tolist() == [[3, 0, 1, 2]] and weights[0, 1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("method", METHODS)
def test_nan_counts_as_minus_infinity(
    method: RoutingMethod, dtype: Any, rng: np.random.Generator
) -> None:
    logits = rng.standard_normal((40, 24)).astype(dtype)
    holes = rng.random(logits.shape) < 0.5
    plain, poisoned = logits.copy(), logits.copy()
    plain[holes] = -np.inf
    poisoned[holes] = np.nan
    poisoned[::2] = np.where(holes[::2], -poisoned[::2], poisoned[::2])
    if dtype == F32:
        sign = np.signbit(poisoned[holes])
        assert sign.any() and not sign.all()
    routing = make(method, 24, 16, num_shared_experts=1)
    bias = rng.standard_normal(24).astype(F32)
    assert_same(route(plain, routing, bias=bias), route(poisoned, routing, bias=bias))
    assert np.isnan(poisoned[holes].astype(F32)).all(), "the input was overwritten"


@pytest.mark.parametrize("fill", [-np.inf, np.nan])
@pytest.mark.parametrize("method", METHODS)
def test_rows_without_any_logit(method: RoutingMethod, fill: float) -> None:
    ids, weights = route(np.full((2, 40), fill, F32), make(method, 40, 32))
    expected = -np.inf if method is RoutingMethod.TOP_K else 0.0
    assert ids.tolist() == [list(range(ids.shape[1]))] * 2
    assert (weights == expected).all()


def test_all_logits_masked_leaves_the_order_to_the_bias() -> None:
    bias = np.array([-3, -1, -2, -5], F32)
    ids, weights = route(np.full((1, 4), -np.inf, F32), make("minimax2", 4, 4), bias=bias)
    assert ids.tolist() == [[1, 2, 0, 3]] and weights.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("method", ["default", "renormalize"])
def test_infinite_logits_share_the_softmax(method: str) -> None:
    ids, weights = route(np.array([[1, np.inf, -np.inf, np.inf]], F32), make(method, 4, 3))
    assert ids.tolist() == [[1, 3, 0]] and weights.tolist() == [[0.5, 0.5, 0.0]]


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
SPECIAL = st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 3e38, -3e38, 1e-45])


@pytest.mark.parametrize("method", METHODS)
@settings(SETTINGS, max_examples=60)
@given(st.data())
def test_never_a_duplicate_id(method: RoutingMethod, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4)) if method is RoutingMethod.DEEPSEEK_V3 else 1
    num_experts = groups * data.draw(st.integers(1, 10))
    entries = st.lists(FLOATS | SPECIAL, min_size=num_experts, max_size=num_experts)
    logits = np.array([data.draw(entries)], F32)
    bias = np.array(data.draw(entries), F32)
    routing = make(method, num_experts, 32, num_groups=groups, top_groups=groups)
    ids, weights = route(logits, routing, bias=bias)
    chosen = set(ids[0].tolist())
    assert len(chosen) == routing.top_k and chosen <= set(range(num_experts))
    assert not np.isnan(weights).any()
    if method is not RoutingMethod.TOP_K:
        assert ((weights >= 0) & (weights <= 1)).all()


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_zero_tokens(method: RoutingMethod) -> None:
    routing = make(method, 64, 8, num_shared_experts=2, weights_dtype="bfloat16")
    ids, weights = route(np.empty((0, 64), BF16), routing, bias=np.zeros(64, F32))
    assert ids.shape == weights.shape == (0, routing.total_top_k)
    assert ids.dtype == np.int32 and weights.dtype == BF16


def test_missing_bias_is_zero_and_others_ignore_it(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((16, 64)).astype(F32)
    large = rng.standard_normal(64).astype(F32) * 10
    for method in METHODS:
        routing = make(method, 64, 8)
        none = route(logits, routing)
        assert_same(none, route(logits, routing, bias=np.zeros(64, F32)))
        given_bias = route(logits, routing, bias=large)
        if method in BIASED:
            assert (none.ids != given_bias.ids).any()
        else:
            assert_same(none, given_bias)


def test_bias_rounding_is_an_option_of_both_biased_methods() -> None:
    # 1 + 2^-9 rounds down to 1 in bf16, so expert 0 wins the tie; unrounded, expert 1 wins.
    bias = np.array([1, 1 + 2.0**-9], F32)
    logits = np.zeros((1, 2), F32)
    for method in BIASED:
        assert route(logits, make(method, 2, 1), bias=bias).ids.tolist() == [[1]]
        rounded = make(method, 2, 1, bias_round_bf16=True)
        assert route(logits, rounded, bias=bias).ids.tolist() == [[0]]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_inputs_and_outputs_add_one_rounding(
    method: RoutingMethod, rng: np.random.Generator
) -> None:
    logits = (rng.standard_normal((32, 128)) * 3).astype(BF16)
    bias = rng.standard_normal(128).astype(BF16)
    options = {"scaling_factor": 2.5, "num_shared_experts": 1}
    wide = make(method, 128, 8, **options)
    topk = route(logits.astype(F32), wide, bias=bias.astype(F32))
    assert_same(topk, route(logits, wide, bias=bias))
    narrow = route(logits, make(method, 128, 8, weights_dtype="bfloat16", **options), bias=bias)
    assert_same(narrow, TopK(topk.ids, topk.weights.astype(BF16)))


def test_equivalent_methods(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((32, 96)).astype(F32)
    plain = {m: route(logits, make(m, 96, 6)) for m in METHODS}
    assert_same(plain[RoutingMethod.RENORMALIZE], plain[RoutingMethod.RENORMALIZE_NAIVE])
    assert_same(plain[RoutingMethod.DEEPSEEK_V3], plain[RoutingMethod.MINIMAX2])
    off = route(logits, make("sigmoid_renorm", 96, 6, normalize=False))
    assert_same(plain[RoutingMethod.SIGMOID], off)
    on = route(logits, make("sigmoid_renorm", 96, 6, normalize=True))
    assert_same(plain[RoutingMethod.SIGMOID_RENORM], on)
    top1 = route(logits, make("top_k_sigmoid", 96, 1))
    assert_same(plain[RoutingMethod.LLAMA4], top1)
    for m in UNSCALED:
        scaled = route(logits, make(m, 96, 6, scaling_factor=1.7)).weights
        np.testing.assert_array_equal(bits(scaled), bits(plain[m].weights * F32(1.7)))


# --- packing -----------------------------------------------------------------------------------


def test_packing_round_trips_every_weight() -> None:
    """All 65536 bf16 patterns with ids of both signs; NaN may change its payload, never the id."""
    pattern = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    ids = np.resize(np.array([0, 1, 255, 2047, 32767, -1, -32768], np.int32), pattern.shape)
    back = unpack(pack(TopK(ids, pattern.view(BF16))))
    np.testing.assert_array_equal(back.ids, ids)
    assert back.ids.dtype == np.int32 and back.weights.dtype == BF16
    np.testing.assert_array_equal(bits(back.weights), pattern)


def test_packing_rounds_to_nearest_even() -> None:
    weights = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -0.0]], F32)
    packed = pack(TopK(np.zeros((1, 4), np.int32), weights)).packed
    assert packed.tolist() == [[0x3F80, 0x3F82, 0x3F81, 0x8000]]


def test_packing_keeps_foreign_ids_inert() -> None:
    ids = np.array([[1 << 16, (1 << 16) + 3, 32768, -32769, 2**31 - 1, -(2**31)]], np.int32)
    back = unpack(pack(TopK(ids, np.ones(ids.shape, F32))))
    assert back.ids.tolist() == [[-1] * 6] and back.weights.tolist() == [[1.0] * 6]
