"""``MoELayer``: the same bits as the free functions, within its planned number of tokens."""

from __future__ import annotations

import numpy as np
import pytest

import cumoe
from cumoe import ExpertShard, MoELayer, Routing, TopK
from tests.brute_force import random_layer
from tests.helpers import (
    BF16,
    Poisoned,
    assert_close_blocks,
    assert_same_bits,
    each_backend,
    to_backend,
    to_host,
)

ROUTING = Routing(
    "deepseek_v3",
    num_experts=12,
    top_k=3,
    num_groups=4,
    top_groups=2,
    scaling_factor=2.5,
    num_shared_experts=1,
)
each_recipe = pytest.mark.parametrize("recipe", ["bf16", "fp8_block", "fp8_tensor"])


def planned(random, backend, **options):
    """Plan a layer for up to 40 tokens."""
    weights, bias = to_backend(random.weights, backend), to_backend(random.bias, backend)
    return MoELayer(weights, random.routing, max_num_tokens=40, bias=bias, **options)


@each_backend
@each_recipe
def test_same_bits_as_the_function(rng, backend, recipe):
    random = random_layer(rng, ROUTING, recipe, num_tokens=40)
    layer = planned(random, backend)
    x, logits, bias = (to_backend(a, backend) for a in (random.x, random.logits, random.bias))
    for count in (40, 1, 7, 33, 40):
        out = Poisoned((count, 64), "bfloat16", backend)
        assert layer(x[:count], logits[:count], out=out.array) is out.array
        out.check_guards()
        expected = cumoe.moe(x[:count], logits[:count], layer.weights, routing=ROUTING, bias=bias)
        assert_same_bits(out.array, expected)
        assert_same_bits(layer(x[:count], logits[:count]), expected)
    want = random.run()
    assert_close_blocks(layer(x, logits), want, f"layer {recipe}")


@each_backend
@each_recipe
@pytest.mark.parametrize("packed", [False, True])
def test_given_routing(rng, backend, packed, recipe):
    random = random_layer(rng, ROUTING, recipe)
    layer = planned(random, backend)
    topk = TopK(
        rng.integers(-1, 12, (13, 3)).astype(np.int32), rng.uniform(-1, 1, (13, 3)).astype(BF16)
    )
    topk = to_backend(cumoe.pack(topk) if packed else topk, backend)
    x = to_backend(random.x, backend)
    expected = cumoe.routed_moe(x, topk, layer.weights, num_shared_experts=1)
    assert_same_bits(layer(x, topk=topk), expected)
    parts = layer(x, topk=topk, finalize=False)
    assert_same_bits(cumoe.finalize_parts(parts), expected)


@each_backend
def test_without_routing(rng, backend):
    """Up to 32 columns, a number that changes from call to call."""
    random = random_layer(rng, Routing("top_k", num_experts=9, top_k=1), "bf16")
    shard = ExpertShard(2, 5)
    weights = to_backend(random.weights.shard(shard), backend)
    layer = MoELayer(weights, max_num_tokens=13, shard=shard, num_experts=9)
    x = to_backend(random.x, backend)
    for columns, dtype in ((1, np.float32), (32, BF16), (4, np.float32)):
        ids = rng.integers(0, 9, (13, columns)).astype(np.int32)
        topk = TopK(ids, rng.uniform(0, 1, (13, columns)).astype(dtype))
        got = layer(x, topk=to_backend(topk, backend))
        want = random.run(ids, topk.weights.astype(np.float64), shard)
        assert_close_blocks(got, want, "layer bf16")
    with pytest.raises(ValueError, match="logits: this layer was built without routing"):
        layer(x, x)


@each_backend
def test_replay_and_out_dtypes(rng, backend):
    random = random_layer(rng, ROUTING, "fp8_block")
    layer = planned(random, backend)
    x, logits = to_backend(random.x, backend), to_backend(random.logits, backend)
    replay = Poisoned((14, 3), "i2", backend)
    for dtype in ("float32", "float16", "bfloat16"):
        out = Poisoned((13, 64), dtype, backend)
        layer(x, logits, out=out.array, replay_out=replay.array)
        out.check_guards()
        assert_close_blocks(out.array, random.run(), "layer fp8_block")
    replay.check_guards()
    np.testing.assert_array_equal(to_host(replay.array)[:13], random.topk()[0][:, :3])
    assert_same_bits(layer(x, logits), out.array)


@each_backend
def test_no_tokens_and_too_many(rng, backend):
    random = random_layer(rng, ROUTING, "bf16", num_tokens=41)
    layer = planned(random, backend)
    x, logits = to_backend(random.x, backend), to_backend(random.logits, backend)
    assert layer(x[:0], logits[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match="x: expected at most max_num_tokens = 40 rows, got 41"):
        layer(x, logits)
    assert layer(x[:40], logits[:40]).shape == (40, 64)


def test_a_layer_on_the_host_has_no_plan(rng):
    layer = planned(random_layer(rng, ROUTING, "bf16"), "numpy")
    assert layer.workspace_bytes == 0
    for call in (layer.plan, layer.warmup):
        with pytest.raises(ValueError, match="plan: needs a layer on a device with routing"):
            call(4)
