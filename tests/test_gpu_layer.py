"""The whole layer on a GPU: against its twin at every number of tokens, and as graphs replay it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe import ExpertShard, MoELayer, Routing, TopK
from cumoe.launch import current_device
from cumoe.tuning import SM90_ARCH
from tests.brute_force import Layer, random_layer
from tests.helpers import (
    BF16,
    POISON,
    Poisoned,
    assert_close_blocks,
    assert_same_bits,
    to_backend,
    to_host,
    words,
)

pytestmark = pytest.mark.gpu

RECIPES = ["bf16", "fp8_block", "fp8_tensor"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
ROUTING = Routing(
    "deepseek_v3",
    num_experts=24,
    top_k=4,
    num_groups=4,
    top_groups=2,
    scaling_factor=2.5,
    num_shared_experts=1,
)
TOKENS = [*range(66), 127, 128, 129, 255, 256, 257]
STAGES = ["routing", "quantize", "gemm1", "gemm2", "finalize"]


def expected(random: Layer, **options: Any) -> np.ndarray:
    """Return the twin's result in float32."""
    out = np.empty(random.x.shape, np.float32)
    return cumoe.moe(
        random.x,
        random.logits,
        random.weights,
        routing=random.routing,
        bias=random.bias,
        out=out,
        **options,
    )


def inputs(random: Layer, seed: int) -> tuple[Any, Any]:
    """Return other tokens and logits for a layer, on the device."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(random.x.shape, np.float32).astype(random.x.dtype)
    logits = rng.standard_normal(random.logits.shape, np.float32)
    return to_backend(x, "cupy"), to_backend(logits, "cupy")


def planned(random: Layer, max_num_tokens: int, **options: Any) -> MoELayer:
    """Plan a layer on the device."""
    return MoELayer(
        to_backend(random.weights, "cupy"),
        random.routing,
        max_num_tokens=max_num_tokens,
        bias=to_backend(random.bias, "cupy"),
        **options,
    )


def poison(layer: MoELayer) -> None:
    """Fill every buffer between the stages with NaN; queues are zeros between calls."""
    assert layer._workspace is not None
    for name, buffer in layer._workspace._buffers.items():
        if name != "queues":
            buffer.fill(POISON)


@pytest.mark.parametrize(
    ("recipe", "portable"),
    [
        ("bf16", False),
        ("fp8_block", False),
        ("fp8_block", True),
        ("fp8_tensor", False),
        ("fp8_tensor", True),
    ],
)
def test_every_number_of_tokens(rng, recipe, portable):
    """Planned and free calls give the same bits, close to the twin, and write nothing else."""
    random = random_layer(
        rng, ROUTING, recipe, num_tokens=257, hidden_size=144, intermediate_size=48
    )
    want = expected(random)
    layer = planned(random, 257, portable=portable)
    x, logits, bias = (to_backend(a, "cupy") for a in (random.x, random.logits, random.bias))
    for count in TOKENS:
        out = Poisoned((count, 144), "bfloat16", "cupy")
        poison(layer)
        layer(x[:count], logits[:count], out=out.array)
        out.check_guards()
        got = to_host(out.array) if portable else out.array
        assert_close_blocks(got, want[:count], f"layer {recipe}")
        if portable:
            continue
        free = Poisoned((count, 144), "bfloat16", "cupy")
        cumoe.moe(
            x[:count], logits[:count], layer.weights, routing=ROUTING, bias=bias, out=free.array
        )
        free.check_guards()
        assert_same_bits(free.array, out.array)


@each_recipe
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "num_tokens"),
    [(720, 704, 1000), (2880, 1408, 33), (512, 2880, 300)],
)
def test_larger_sizes(rng, recipe, hidden_size, intermediate_size, num_tokens):
    """Sizes of named models that no tile divides; results repeat to the bit."""
    random = random_layer(
        rng,
        Routing("renormalize", num_experts=4, top_k=2),
        recipe,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )
    random.logits[: num_tokens // 2, 3] += 4
    layer = planned(random, num_tokens)
    x, logits = to_backend(random.x, "cupy"), to_backend(random.logits, "cupy")
    first = layer(x, logits).copy()
    longest = max(hidden_size, intermediate_size)
    assert_close_blocks(first, expected(random), f"layer {recipe}", k=longest)
    for _ in range(3):
        poison(layer)
        assert_same_bits(layer(x, logits), first)


@each_recipe
def test_tokens_in_expert_order(rng, recipe):
    """Hundreds of tokens an expert: copied first, from whatever array a call brings."""
    routing = Routing("renormalize", num_experts=3, top_k=2, num_shared_experts=1)
    random = random_layer(
        rng, routing, recipe, num_tokens=500, hidden_size=400, intermediate_size=4096
    )
    layer = planned(random, 500)
    copied = current_device().arch == SM90_ARCH
    names = [launch.spec.name for launch in layer.plan(500).stages["gemm1"]]
    first = "permute_rows" if recipe == "bf16" else f"quantize_{recipe}"
    assert (names[0] == first) == copied and len(names) == 1 + copied
    x, logits = to_backend(random.x, "cupy"), to_backend(random.logits, "cupy")
    poison(layer)
    first = layer(x, logits).copy()
    assert_close_blocks(first, expected(random), f"layer {recipe}", k=4096)
    zeros = layer(to_backend(np.zeros_like(random.x), "cupy"), logits)
    assert not to_host(zeros).any()
    assert_same_bits(layer(x, logits), first)
    if recipe == "fp8_block":
        q = cumoe.quantize_fp8_block(x)
        assert_same_bits(layer(q, logits), first)
        by_column = cumoe.Quantized(q.values, q.scale.T.copy().T)
        assert_same_bits(layer(by_column, logits), first)
    if recipe == "fp8_tensor":
        q = cumoe.quantize_fp8_tensor(x, scale=layer.weights.x_scale)
        assert_same_bits(layer(q, logits), first)


@each_recipe
def test_repeats_for_given_routing(rng, recipe):
    """Duplicates, foreign ids and an uneven shard: the same bits three times over."""
    random = random_layer(rng, ROUTING, recipe, num_tokens=200, hidden_size=256)
    shard = ExpertShard.from_counts([5, 12, 7], 1)
    ids = rng.integers(-1, 26, (200, 4)).astype(np.int32)
    topk = TopK(ids, rng.uniform(-1, 1, (200, 4)).astype(BF16))
    options = {"num_experts": 24, "num_shared_experts": 1, "shard": shard}
    weights = random.weights.shard(shard, 1)
    want = cumoe.routed_moe(random.x, topk, weights, **options)
    x, given, held = (to_backend(a, "cupy") for a in (random.x, topk, weights))
    results = [cumoe.routed_moe(x, given, held, **options) for _ in range(3)]
    results.append(cumoe.routed_moe(x, cumoe.pack(given), held, **options))
    assert_close_blocks(results[0], want, f"layer {recipe}")
    for again in results[1:]:
        assert_same_bits(again, results[0])


class TestGraphs:
    """A planned call neither synchronises nor allocates: a capture would fail if it did."""

    @staticmethod
    def capture(call: Any) -> Any:
        """Run a call once, then capture it on the current stream."""
        import cupy

        stream = cupy.cuda.get_current_stream()
        call()
        stream.synchronize()
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeThreadLocal)
        call()
        return stream.end_capture()

    @each_recipe
    @pytest.mark.parametrize("num_tokens", [1, 37, 150])
    def test_replay_with_other_inputs(self, rng, recipe, num_tokens):
        import cupy

        random = random_layer(rng, ROUTING, recipe, num_tokens=num_tokens, hidden_size=128)
        layer = planned(random, num_tokens)
        bias = to_backend(random.bias, "cupy")
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x, logits = inputs(random, 0)
            out = Poisoned(random.x.shape, "bfloat16", "cupy")
            replay = Poisoned((num_tokens, 4), "i2", "cupy")
            graph = self.capture(lambda: layer(x, logits, out=out.array, replay_out=replay.array))
            for seed in range(1, 4):
                other_x, other_logits = inputs(random, seed)
                words(x)[...], logits[...] = words(other_x), other_logits
                poison(layer)
                graph.launch()
                eager = cumoe.moe(other_x, other_logits, layer.weights, routing=ROUTING, bias=bias)
                ids = cumoe.route(other_logits, ROUTING, bias=bias).ids
                stream.synchronize()
                assert_same_bits(out.array, eager)
                np.testing.assert_array_equal(to_host(replay.array), to_host(ids)[:, :4])
            out.check_guards()

    @pytest.mark.parametrize("packed", [False, True])
    def test_given_routing(self, rng, packed):
        import cupy

        random = random_layer(rng, ROUTING, "fp8_block", num_tokens=20, hidden_size=128)
        layer = planned(random, 20)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x = to_backend(random.x, "cupy")
            ids, weights = rng.integers(0, 24, (20, 4)).astype(np.int32), np.ones((20, 4), BF16)
            topk = to_backend(TopK(ids, weights), "cupy")
            given = cumoe.pack(topk) if packed else topk
            out = Poisoned(random.x.shape, "float32", "cupy")
            graph = self.capture(lambda: layer(x, topk=given, out=out.array))
            other = to_backend(TopK(ids[::-1].copy(), weights), "cupy")
            other = cumoe.pack(other) if packed else other
            given[0][...] = other[0]
            graph.launch()
            eager = Poisoned(random.x.shape, "float32", "cupy")
            cumoe.routed_moe(x, other, layer.weights, num_shared_experts=1, out=eager.array)
            stream.synchronize()
            assert_same_bits(out.array, eager.array)

    def test_nothing_is_allocated(self, rng):
        import cupy

        class Count(cupy.cuda.MemoryHook):
            name = "count"
            calls = 0

            def malloc_preprocess(self, **_: Any) -> None:
                self.calls += 1

        random = random_layer(rng, ROUTING, "fp8_block", num_tokens=64, hidden_size=128)
        layer = planned(random, 64)
        x, logits = inputs(random, 0)
        out = cupy.empty(x.shape, x.dtype)
        held = layer.workspace_bytes
        for count in (64, 3, 64):
            with Count() as hook:
                layer(x[:count], logits[:count], out=out[:count])
            assert hook.calls == 0 and layer.workspace_bytes == held > 0
        with Count() as hook:
            layer(x, logits)
        assert hook.calls == 1


class TestPlaces:
    @each_recipe
    def test_current_stream(self, rng, recipe):
        """Work is queued behind what the caller queued before; the host does not wait for it."""
        import cupy

        random = random_layer(rng, ROUTING, recipe, num_tokens=30, hidden_size=128)
        layer = planned(random, 30)
        new_x, new_logits = inputs(random, 1)
        eager = layer(new_x, new_logits)
        x, logits = inputs(random, 2)
        out = cupy.empty(x.shape, x.dtype)
        cupy.cuda.Device().synchronize()
        wait = cupy.RawKernel(
            'extern "C" __global__ void wait(long long n)'
            " { long long t = clock64(); while (clock64() - t < n) {} }",
            "wait",
        )
        with cupy.cuda.Stream(non_blocking=True) as stream:
            wait((1,), (1,), (np.int64(1),))
            layer(x, logits, out=out)
            stream.synchronize()
            wait((1,), (1,), (np.int64(1_000_000_000),))
            words(x)[...], logits[...] = words(new_x), new_logits
            layer(x, logits, out=out)
            assert not stream.done, "the call waited for the device"
            stream.synchronize()
        assert_same_bits(out, eager)

    @pytest.mark.multigpu
    @each_recipe
    def test_another_device(self, rng, recipe):
        """Arrays decide the device, whichever is current."""
        import cupy

        random = random_layer(rng, ROUTING, recipe, num_tokens=9, hidden_size=128)
        want = expected(random)
        with cupy.cuda.Device(1):
            layer = planned(random, 9)
            arguments = [to_backend(a, "cupy") for a in (random.x, random.logits)]
            bias = to_backend(random.bias, "cupy")
        with cupy.cuda.Device(0):
            planned_result = layer(*arguments)
            free = cumoe.moe(*arguments, layer.weights, routing=ROUTING, bias=bias)
            assert planned_result.device.id == free.device.id == 1
            with pytest.raises(ValueError, match="x: expected an array on cuda:1 like weights"):
                layer(to_backend(random.x, "cupy"), arguments[1])
        with cupy.cuda.Device(1):
            assert_close_blocks(planned_result, want, f"layer {recipe}")
            assert_same_bits(free, planned_result)


class TestPlan:
    @each_recipe
    def test_stages(self, rng, recipe):
        layer = planned(random_layer(rng, ROUTING, recipe, hidden_size=128), 64)
        plan = layer.plan(64)
        absent = {"quantize"} if recipe == "bf16" else set()
        assert list(plan.stages) == [stage for stage in STAGES if stage not in absent]
        assert plan.tile >= 8 and set(plan.configs) == {"gemm1", "gemm2"}
        assert plan is layer.plan(64)
        layer.warmup(17)

    def test_many_numbers_of_tokens(self, rng):
        """The plans kept are bounded; a dropped one is made again."""
        random = random_layer(rng, ROUTING, "bf16", num_tokens=300)
        layer = planned(random, 300)
        x, logits = to_backend(random.x, "cupy"), to_backend(random.logits, "cupy")
        first = to_host(layer(x[:5], logits[:5]))
        for count in range(1, 300):
            layer(x[:count], logits[:count])
        assert len(layer._plans) <= 256
        assert_same_bits(layer(x[:5], logits[:5]), first)
