"""The routing kernels against their twins, to the bit: every method, many sizes, odd logits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cumoe
from cumoe import ExpertShard, Routing, RoutingMethod, kernels, kernels_routing
from cumoe.kernels_routing import Experts, Source
from cumoe.launch import current_device
from cumoe.permutation import plan_permutation
from cumoe.reference import exact
from cumoe.reference import permutation as twin_permutation
from cumoe.reference import routing as reference
from tests.helpers import BF16, Poisoned, precompile, to_backend, to_host, words

pytestmark = pytest.mark.gpu

SIZES = {
    8: (2, 4, 2),
    72: (6, 9, 3),
    96: (8, 3, 2),
    160: (6, 8, 3),
    256: (8, 8, 4),
    384: (8, 1, 1),
    512: (10, 16, 4),
    1024: (32, 32, 8),
    2048: (32, 64, 16),
}
"""Experts -> top-k, and DeepSeek's groups and top groups."""

TOKENS = (1, 7, 150, 1000)
BIASED = (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)


def routing_of(method: RoutingMethod, num_experts: int, dtype: str) -> Routing:
    """Return a routing with varied options."""
    top_k, groups, top_groups = SIZES[num_experts]
    grouped = method is RoutingMethod.DEEPSEEK_V3
    half = dtype == "bfloat16"
    return Routing(
        method,
        num_experts=num_experts,
        top_k=1 if method is RoutingMethod.LLAMA4 else top_k,
        num_groups=groups if grouped else 1,
        top_groups=top_groups if grouped else 1,
        scaling_factor=2.5 if half else 1.0,
        normalize=False if half and method is RoutingMethod.SIGMOID_RENORM else None,
        num_shared_experts=num_experts % 5,
        weights_dtype="bfloat16" if num_experts % 3 == 0 else "float32",
        bias_round_bf16=half,
    )


CASES = list(itertools.product(RoutingMethod, SIZES, ("float32", "bfloat16")))


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile all kernels of this file in parallel."""
    precompile(
        kernels_routing.routing_spec(routing_of(method, experts, dtype), dtype, bias)
        for method, experts, dtype in CASES
        for bias in ("float32", None)
    )


def awkward_logits(rng: np.random.Generator, num_tokens: int, num_experts: int) -> np.ndarray:
    """Draw logits; every eighth rows hold ties, zeros of both signs, NaN, infinities, extremes."""
    x = rng.standard_normal((num_tokens, num_experts), np.float32) * 3
    x[1::8] = np.round(x[1::8])
    x[2::8] = np.where(x[2::8] > 0, np.float32(0.0), np.float32(-0.0))
    x[3::8][x[3::8] > 2] = np.nan
    x[4::8][x[4::8] > 4] = np.inf
    x[4::8][x[4::8] < -2] = -np.inf
    x[5::8] *= np.float32(1e37)
    x[6::8] *= np.float32(1e-39)
    x[7::16], x[15::32], x[31::32] = -np.inf, np.nan, np.inf
    return x


def assert_same(got: cumoe.TopK, want: cumoe.TopK) -> None:
    """Compare ids and weights to the bit; a NaN may have any bits."""
    ids, weights = to_host(got)
    np.testing.assert_array_equal(ids, want.ids)
    assert weights.dtype == want.weights.dtype
    nan = np.isnan(want.weights.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(weights.astype(np.float32)), nan)
    np.testing.assert_array_equal(words(weights)[~nan], words(want.weights)[~nan])


@pytest.mark.parametrize(
    ("method", "num_experts", "dtype"), CASES, ids=lambda v: getattr(v, "value", v)
)
def test_same_bits_as_twin(rng, method, num_experts, dtype):
    routing = routing_of(method, num_experts, dtype)
    logits = awkward_logits(rng, max(TOKENS), num_experts)
    logits = logits.astype(BF16 if dtype == "bfloat16" else np.float32)
    bias = rng.uniform(-0.5, 0.5, num_experts).astype(np.float32)
    for given in (bias, None) if method in BIASED else (bias,):
        want = reference.route(logits, routing, bias=given)
        device_bias = to_backend(given, "cupy")
        for count in TOKENS:
            x = to_backend(logits[:count], "cupy")
            got = cumoe.route(x, routing, bias=device_bias)
            assert_same(got, cumoe.TopK(want.ids[:count], want.weights[:count]))


def test_sigmoid(rng):
    """Four million numbers, those near 2^-23 among them, where a quotient is nearly a tie."""
    near = (np.float32(2.0**-23).view(np.uint32) + np.arange(-(1 << 20), 1 << 20)).astype(np.uint32)
    low, high = (int(np.float32(x).view(np.uint32)) for x in (2.0**-28, 2.0**7))
    x = np.concatenate([near, rng.integers(low, high, 1 << 21).astype(np.uint32)]).view(np.float32)
    x[1::2] *= -1
    x = x.reshape(-1, 32)
    ids, weights = to_host(cumoe.route(to_backend(x, "cupy"), Routing("sigmoid", 32, 32)))
    got = np.empty_like(x)
    np.put_along_axis(got, ids, weights, axis=1)
    np.testing.assert_array_equal(words(got), words(exact.sigmoid(x)))


@pytest.mark.parametrize("bias_dtype", [np.float32, BF16])
def test_bias_that_is_no_number(rng, bias_dtype):
    routing = routing_of(RoutingMethod.DEEPSEEK_V3, 160, "float32")
    logits = awkward_logits(rng, 100, 160)
    bias = rng.standard_normal(160).astype(bias_dtype)
    bias[[3, 20, 21, 90]] = [np.nan, np.inf, -np.inf, -np.inf]
    got = cumoe.route(to_backend(logits, "cupy"), routing, bias=to_backend(bias, "cupy"))
    assert_same(got, reference.route(logits, routing, bias=bias))


def test_groups_of_one_expert(rng):
    routing = Routing("deepseek_v3", num_experts=64, top_k=4, num_groups=64, top_groups=5)
    logits = awkward_logits(rng, 100, 64)
    got = cumoe.route(to_backend(logits, "cupy"), routing)
    assert_same(got, reference.route(logits, routing))


@pytest.mark.parametrize("method", [RoutingMethod.DEFAULT, RoutingMethod.DEEPSEEK_V3])
def test_replay_guards_and_repeats(rng, method):
    routing = routing_of(method, 256, "float32")
    logits = awkward_logits(rng, 333, 256)
    want = reference.route(logits, routing)
    columns = routing.total_top_k
    for _ in range(3):
        ids, weights, replay = (
            Poisoned((rows, width), dtype, "cupy")
            for rows, width, dtype in (
                (333, columns, "i4"),
                (333, columns, routing.weights_dtype),
                (340, routing.top_k, "i2"),
            )
        )
        out = cumoe.TopK(ids.array, weights.array)
        cumoe.route(to_backend(logits, "cupy"), routing, out=out, replay_out=replay.array)
        for poisoned in (ids, weights, replay):
            poisoned.check_guards()
        assert_same(out, want)
        written = to_host(replay.array)
        np.testing.assert_array_equal(written[:333], want.ids[:, : routing.top_k])
        assert (written[333:] == -1).all()


ONE_BLOCK, CLUSTER = kernels_routing.BLOCK_TOKENS, 16 * kernels_routing.CLUSTER_TOKENS
HALF = CLUSTER // 2
CUTS = (
    0, 1, ONE_BLOCK, ONE_BLOCK + 1, 32, 33, HALF, HALF + 1, 150, CLUSTER, CLUSTER + 1, 1000, 5000
)  # fmt: skip
"""Numbers of tokens around the change from one block to a cluster, and to two launches."""


def with_permutation(source: Source, experts: Experts, tile: int) -> dict[str, np.ndarray]:
    """Run a source and its permutation twice and return everything written, poisoned before."""
    import cupy

    arrays = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: str) -> cupy.ndarray:
        arrays[name] = Poisoned(tuple(shape), dtype, "cupy")
        arrays[name].array[...] = 77
        return arrays[name].array

    cluster = kernels_routing.cluster_size(current_device())
    permutation, launches = plan_permutation(source, experts, tile, cluster, allocate)
    written = permutation._asdict() | {"ids": source.ids, "weights": source.weights}
    results = []
    for _ in range(2):
        kernels.run(launches, source.ids_in if source.logits is None else source.logits)
        results.append(
            {n: to_host(a).copy() for n, a in written.items() if n != "tile" and a is not None}
        )
    for poisoned in arrays.values():
        poisoned.check_guards()
    for name, first in results[0].items():
        np.testing.assert_array_equal(words(first), words(results[1][name]))
    return results[0]


def assert_permutation(got: dict[str, np.ndarray], ids: np.ndarray, experts: Experts, tile: int):
    """Compare every table with the twin's."""
    want = twin_permutation.group(
        ids,
        num_experts=experts.num_experts,
        num_shared_experts=experts.num_shared,
        shard=experts.shard,
        tile=tile,
    )
    for name, array in want._asdict().items():
        if name != "tile":
            np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("num_experts", [72, 256, 384, 512, 2048])
def test_with_permutation(rng, num_experts, sharded):
    import cupy

    routing = routing_of(RoutingMethod.DEEPSEEK_V3, num_experts, "float32")
    shard = ExpertShard.even(num_experts, 1, 3) if sharded else ExpertShard(0, num_experts)
    experts = Experts(num_experts, routing.num_shared_experts, shard)
    logits = awkward_logits(rng, max(CUTS), num_experts)
    bias = rng.uniform(-0.5, 0.5, num_experts).astype(np.float32)
    want = reference.route(logits, routing, bias=bias)
    for count, tile in zip(CUTS, itertools.cycle((8, 16, 64, 7)), strict=False):
        shape = (count, routing.total_top_k)
        source = Source(
            cupy.full(shape, 77, np.int32),
            to_backend(np.full(shape, 77, want.weights.dtype), "cupy"),
            logits=to_backend(logits[:count], "cupy"),
            bias=to_backend(bias, "cupy"),
            routing=routing,
        )
        got = with_permutation(source, experts, tile)
        topk = cumoe.TopK(got["ids"], got["weights"])
        assert_same(topk, cumoe.TopK(want.ids[:count], want.weights[:count]))
        assert_permutation(got, want.ids[:count], experts, tile)


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 500, 2048, 2049, 20000])
def test_given_ids_with_permutation(rng, count, skewed):
    """Some ids are no expert's, some repeat in a row; or nearly all are one expert's."""
    experts = Experts(90, 2, ExpertShard.from_counts([40, 50], 1))
    ids = rng.integers(-2, 93, (count, 8)).astype(np.int32)
    if skewed:
        ids[:, 1:] = 77
    got = with_permutation(Source(ids_in=to_backend(ids, "cupy")), experts, 16)
    assert_permutation(got, ids, experts, 16)


def test_captured_and_replayed(rng):
    """A graph of both forms, replayed on other logits, leaves nothing behind."""
    import cupy

    routing = routing_of(RoutingMethod.DEEPSEEK_V3, 256, "float32")
    experts = Experts(256, routing.num_shared_experts, ExpertShard(0, 256))
    stream = cupy.cuda.Stream(non_blocking=True)
    for count in (ONE_BLOCK, 150, 1000):
        logits = awkward_logits(rng, 2 * count, 256)
        x = to_backend(logits[:count], "cupy")
        shape = (count, routing.total_top_k)
        source = Source(cupy.empty(shape, "i4"), cupy.empty(shape, "f4"), logits=x, routing=routing)
        kept: list[cupy.ndarray] = []

        def allocate(name, shape, dtype, kept=kept):
            kept.append(cupy.empty(tuple(shape), dtype))
            return kept[-1]

        cluster = kernels_routing.cluster_size(current_device())
        permutation, launches = plan_permutation(source, experts, 16, cluster, allocate)
        with stream:
            kernels.run(launches, x)
            stream.begin_capture()
            for _ in range(3):
                kernels.run(launches, x)
            graph = stream.end_capture()
            for part in (logits[count:], logits[:count]):
                x.set(part)
                graph.launch()
                stream.synchronize()
                want = reference.route(part, routing)
                written = permutation._asdict()
                got = {name: to_host(a) for name, a in written.items() if name != "tile"}
                assert_same(cumoe.TopK(source.ids, source.weights), want)
                assert_permutation(got, want.ids, experts, 16)
