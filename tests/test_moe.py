"""``moe`` and ``routed_moe`` against the float64 brute force, on NumPy and on CuPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cumoe
from cumoe import Activation, ExpertShard, PackedTopK, Quantized, Routing, RoutingMethod, TopK
from cumoe.layouts import GATE_UP_ORDERS
from tests.brute_force import random_layer
from tests.helpers import (
    BF16,
    DTYPES,
    Poisoned,
    assert_close_blocks,
    assert_same_bits,
    each_backend,
    to_backend,
    to_host,
)

RECIPES = ["bf16", "fp8_block", "fp8_tensor"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
SIMPLE = Routing("renormalize", num_experts=6, top_k=2)


def routing_of(method, num_shared_experts=0):
    """Return a routing of the method with all it can have, over 12 experts."""
    options = {}
    if method is RoutingMethod.DEEPSEEK_V3:
        options = {"num_groups": 4, "top_groups": 2}
    return Routing(
        method,
        num_experts=12,
        top_k=1 if method is RoutingMethod.LLAMA4 else 3,
        scaling_factor=1.75,
        num_shared_experts=num_shared_experts,
        **options,
    )


def run(layer, backend, **options):
    """Run a random layer's inputs through :func:`cumoe.moe`."""
    inputs = (layer.x, layer.logits, layer.weights, layer.bias)
    x, logits, weights, bias = (to_backend(a, backend) for a in inputs)
    return cumoe.moe(x, logits, weights, routing=layer.routing, bias=bias, **options)


def run_routed(layer, backend, topk, **options):
    """Run a random layer with given routing through :func:`cumoe.routed_moe`."""
    x, weights = to_backend(layer.x, backend), to_backend(layer.weights, backend)
    return cumoe.routed_moe(x, to_backend(topk, backend), weights, **options)


def check(got, layer, want=None):
    """Compare with the brute force, per expert too if each token has one."""
    ids = layer.topk()[0]
    experts = ids[:, 0] if layer.routing.total_top_k == 1 else None
    want = layer.run() if want is None else want
    assert_close_blocks(got, want, f"layer {layer.recipe}", experts=experts)


class TestAgainstBruteForce:
    @each_backend
    @each_recipe
    @pytest.mark.parametrize("num_shared", [0, 2])
    @pytest.mark.parametrize("method", list(RoutingMethod))
    def test_methods(self, rng, backend, method, num_shared, recipe):
        layer = random_layer(rng, routing_of(method, num_shared), recipe)
        got = run(layer, backend)
        assert got.dtype == BF16
        check(got, layer)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("layout", ["major_k", "block_major_k"])
    @pytest.mark.parametrize("order", GATE_UP_ORDERS)
    def test_orders_and_layouts(self, rng, backend, order, layout, recipe):
        """Every storage holds the same numbers, so the results have the same bits."""
        layer = random_layer(
            rng,
            SIMPLE,
            recipe,
            hidden_size=256,
            intermediate_size=128,
            order=order,
            layout=layout,
        )
        got = run(layer, backend)
        check(got, layer)
        plain = dataclasses.replace(layer, order="gate_up", layout="major_k")
        assert_same_bits(got, run(plain, backend))

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("intermediate_size", [48, 176, 704])
    @pytest.mark.parametrize("hidden_size", [64, 720])
    def test_sizes(self, rng, backend, hidden_size, intermediate_size, recipe):
        """Sizes that are no multiple of a tile or a scale block."""
        layer = random_layer(
            rng,
            SIMPLE,
            recipe,
            num_tokens=9,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )
        check(run(layer, backend), layer)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize(
        "routing",
        [
            Routing("llama4", num_experts=5, top_k=1),
            Routing("renormalize", num_experts=40, top_k=32),
            Routing("sigmoid", num_experts=32, top_k=32, num_shared_experts=32),
            Routing("default", num_experts=1, top_k=1),
            Routing("deepseek_v3", num_experts=160, top_k=6, num_groups=8, top_groups=3),
        ],
        ids=["top 1", "top 32", "all and 32 shared", "one expert", "160 experts"],
    )
    def test_numbers_of_experts(self, rng, backend, routing, recipe):
        layer = random_layer(rng, routing, recipe, num_tokens=7)
        check(run(layer, backend), layer)

    @each_backend
    def test_2048_experts(self, rng, backend):
        routing = Routing("default", num_experts=2048, top_k=8)
        layer = random_layer(rng, routing, "bf16", hidden_size=16, intermediate_size=8)
        check(run(layer, backend), layer)

    @each_backend
    @each_recipe
    def test_all_tokens_on_one_expert(self, rng, backend, recipe):
        layer = random_layer(rng, Routing("top_k", num_experts=6, top_k=1), recipe, num_tokens=150)
        layer.logits[:, 4] = 9.0
        check(run(layer, backend), layer)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("per_expert", [False, True])
    def test_activation(self, rng, backend, per_expert, recipe):
        routing = Routing("renormalize", num_experts=4, top_k=2, num_shared_experts=1)
        values = {"alpha": 1.702, "beta": 1.0, "limit": 1.5}
        if per_expert:
            spread = np.linspace(0.5, 1.5, 5, dtype=np.float32)
            values = {name: (value * spread).astype(np.float32) for name, value in values.items()}
        layer = random_layer(rng, routing, recipe, activation=values)
        activation = to_backend(Activation(**values), backend)
        check(run(layer, backend, activation=activation), layer)

    @each_backend
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_dtypes_of_x_and_logits(self, rng, backend, dtype):
        logits_dtype = BF16 if dtype == "bfloat16" else np.float32
        layer = random_layer(
            rng, SIMPLE, "fp8_block", x_dtype=DTYPES[dtype], logits_dtype=logits_dtype
        )
        check(run(layer, backend), layer)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
    def test_out(self, rng, backend, out_dtype, recipe):
        layer = random_layer(rng, SIMPLE, recipe)
        out = Poisoned(layer.x.shape, out_dtype, backend)
        assert run(layer, backend, out=out.array) is out.array
        out.check_guards()
        check(out.array, layer)
        wide = Poisoned(layer.x.shape, "float32", backend)
        run(layer, backend, out=wide.array)
        assert_same_bits(out.array, to_host(wide.array).astype(DTYPES[out_dtype]))


class TestShards:
    COUNTS = (5, 0, 4, 3)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("mode", ["token_slice", "one rank"])
    def test_ranks_add_up(self, rng, backend, mode, recipe):
        """Each rank gives its own part, and the parts give the whole layer."""
        layer = random_layer(rng, routing_of(RoutingMethod.DEEPSEEK_V3, 2), recipe)
        whole = layer.weights
        x, logits, bias = (to_backend(a, backend) for a in (layer.x, layer.logits, layer.bias))
        total = np.zeros(layer.x.shape)
        for rank in range(len(self.COUNTS)):
            shared = "token_slice" if mode == "token_slice" else "none" if rank else "all"
            shard = ExpertShard.from_counts(self.COUNTS, rank, shared)
            part = cumoe.moe(
                x,
                logits,
                to_backend(whole.shard(shard, 2), backend),
                routing=layer.routing,
                bias=bias,
                shard=shard,
                out=Poisoned(layer.x.shape, "float32", backend).array,
            )
            own = layer.run(shard=shard)
            assert_close_blocks(part, own, f"layer {recipe}")
            total += to_host(part)
        check(total, layer)
        full = run(layer, backend, out=Poisoned(layer.x.shape, "float32", backend).array)
        assert_close_blocks(total, to_host(full), "float32")

    @each_backend
    @each_recipe
    def test_given_routing(self, rng, backend, recipe):
        layer = random_layer(rng, routing_of(RoutingMethod.SIGMOID, 1), recipe)
        shard = ExpertShard.even(12, rank=1, world_size=5)
        ids, weights = layer.topk()
        topk = TopK(ids[:, :3].copy(), weights[:, :3].astype(np.float32))
        got = cumoe.routed_moe(
            to_backend(layer.x, backend),
            to_backend(topk, backend),
            to_backend(layer.weights.shard(shard, 1), backend),
            num_experts=12,
            num_shared_experts=1,
            shard=shard,
        )
        check(got, layer, layer.run(shard=shard))

    @each_backend
    @each_recipe
    def test_no_local_token(self, rng, backend, recipe):
        """A rank whose experts nobody chose gives zeros, not what lay in its buffers."""
        layer = random_layer(rng, SIMPLE, recipe)
        topk = TopK(np.full((13, 2), 1, np.int32), np.ones((13, 2), np.float32))
        shard = ExpertShard(3, 3)
        out = Poisoned(layer.x.shape, "bfloat16", backend)
        weights = to_backend(layer.weights.shard(shard), backend)
        x, topk = to_backend(layer.x, backend), to_backend(topk, backend)
        cumoe.routed_moe(x, topk, weights, num_experts=6, shard=shard, out=out.array)
        assert not to_host(out.array).astype(np.float32).any()


class TestGivenRouting:
    @each_backend
    @each_recipe
    @pytest.mark.parametrize("num_shared", [0, 2])
    @pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
    def test_same_bits_as_from_logits(self, rng, backend, num_shared, weights_dtype, recipe):
        routing = dataclasses.replace(
            routing_of(RoutingMethod.DEEPSEEK_V3, num_shared), weights_dtype=weights_dtype
        )
        layer = random_layer(rng, routing, recipe)
        ids, weights = cumoe.route(layer.logits, routing, bias=layer.bias)
        topk = TopK(ids[:, :3].copy(), weights[:, :3].copy())
        got = run_routed(layer, backend, topk, num_shared_experts=num_shared)
        assert_same_bits(got, run(layer, backend))

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("num_shared", [0, 1])
    def test_packed(self, rng, backend, num_shared, recipe):
        layer = random_layer(rng, routing_of(RoutingMethod.SIGMOID, num_shared), recipe)
        ids, weights = cumoe.route(layer.logits, layer.routing)
        topk = TopK(ids[:, :3].copy(), (-weights[:, :3]).astype(BF16))
        packed = cumoe.pack(topk)
        assert isinstance(packed, PackedTopK)
        plain, from_words = (
            run_routed(layer, backend, t, num_shared_experts=num_shared) for t in (topk, packed)
        )
        assert_same_bits(from_words, plain)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("packed", [False, True])
    def test_ids_that_name_no_expert(self, rng, backend, packed, recipe):
        """Such ids are inert, shared experts' own included; repeated ids count each time."""
        layer = random_layer(rng, routing_of(RoutingMethod.SIGMOID, 2), recipe)
        ids = rng.integers(0, 12, (13, 4)).astype(np.int32)
        ids[:, 2] = ids[:, 0]
        ids[::3, 1] = [-1, 12, 13, 14, 3000]
        weights = rng.uniform(-1, 1, (13, 4)).astype(BF16)
        weights[::3, 1] = np.nan
        topk = TopK(ids, weights)
        got = run_routed(layer, backend, cumoe.pack(topk) if packed else topk, num_shared_experts=2)
        routed = np.where(ids >= 12, -1, ids)
        shared = np.tile(np.array([12, 13]), (13, 1))
        want = layer.run(
            np.concatenate([routed, shared], axis=1),
            np.concatenate([weights.astype(np.float64), np.ones((13, 2))], axis=1),
        )
        check(got, layer, want)

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("num_shared", [0, 1])
    @pytest.mark.parametrize("packed", [False, True])
    def test_parts(self, rng, backend, packed, num_shared, recipe):
        """``finalize=False`` and then the sum gives the bits of the whole call."""
        layer = random_layer(rng, routing_of(RoutingMethod.TOP_K, num_shared), recipe)
        topk = TopK(
            rng.integers(-1, 12, (13, 3)).astype(np.int32),
            rng.uniform(-1, 1, (13, 3)).astype(BF16),
        )
        topk = cumoe.pack(topk) if packed else topk
        parts = run_routed(layer, backend, topk, num_shared_experts=num_shared, finalize=False)
        assert parts.rows.dtype == BF16 and parts.permuted_idx.shape == (13, 3 + num_shared)
        whole = run_routed(layer, backend, topk, num_shared_experts=num_shared)
        assert_same_bits(cumoe.finalize_parts(parts), whole)
        parts = run(layer, backend, finalize=False)
        out = Poisoned(layer.x.shape, "float32", backend)
        assert cumoe.finalize_parts(parts, out=out.array) is out.array
        wide = Poisoned(layer.x.shape, "float32", backend)
        assert_same_bits(out.array, run(layer, backend, out=wide.array))


class TestInputs:
    @each_backend
    @pytest.mark.parametrize("column_major", [False, True])
    def test_quantized_x(self, rng, backend, column_major):
        """Activations quantised before the call give the same bits, scales in either order."""
        layer = random_layer(rng, SIMPLE, "fp8_block", hidden_size=720)
        q = cumoe.quantize_fp8_block(layer.x)
        scale = np.ascontiguousarray(q.scale.T).T if column_major else q.scale
        given = dataclasses.replace(layer, x=Quantized(q.values, scale))
        assert_same_bits(run(given, backend), run(layer, backend))

    @each_backend
    @each_recipe
    @pytest.mark.parametrize("num_shared", [0, 1])
    def test_no_tokens(self, rng, backend, num_shared, recipe):
        routing = routing_of(RoutingMethod.DEFAULT, num_shared)
        layer = random_layer(rng, routing, recipe, num_tokens=0)
        got = run(layer, backend)
        assert got.shape == (0, 64) and got.dtype == BF16
        parts = run(layer, backend, finalize=False)
        columns = (0, 3 + num_shared)
        assert parts.rows.shape == (0, 64) and parts.rows.dtype == BF16
        assert parts.topk_weights.shape == parts.permuted_idx.shape == columns
        topk = TopK(np.empty((0, 3), np.int32), np.empty((0, 3), BF16))
        for given in (topk, cumoe.pack(topk)):
            assert run_routed(layer, backend, given, num_shared_experts=num_shared).shape == (0, 64)
            parts = run_routed(layer, backend, given, num_shared_experts=num_shared, finalize=False)
            assert parts.topk_weights.shape == columns and parts.topk_weights.dtype == BF16
            assert cumoe.finalize_parts(parts).shape == (0, 64)

    @each_backend
    def test_replay(self, rng, backend):
        layer = random_layer(rng, routing_of(RoutingMethod.MINIMAX2, 1), "bf16")
        replay = Poisoned((15, 3), "i2", backend)
        run(layer, backend, replay_out=replay.array)
        replay.check_guards()
        written = to_host(replay.array)
        np.testing.assert_array_equal(written[:13], layer.topk()[0][:, :3])
        assert (written[13:] == -1).all()

    @each_backend
    def test_logits_that_are_no_numbers(self, rng, backend):
        """A row of NaN still gives finite results, and other rows do not notice."""
        layer = random_layer(rng, SIMPLE, "bf16")
        plain = to_host(run(layer, backend))
        layer.logits[4] = np.nan
        layer.logits[5, 2] = -np.inf
        got = to_host(run(layer, backend))
        assert np.isfinite(got.astype(np.float32)).all()
        others = np.setdiff1d(np.arange(13), [4, 5])
        assert_same_bits(got[others], plain[others])

    @each_backend
    @each_recipe
    def test_a_token_does_not_notice_its_neighbours(self, rng, backend, recipe):
        """NaN in one token's x stays in that token."""
        layer = random_layer(rng, Routing("top_k", num_experts=3, top_k=2), recipe)
        plain = to_host(run(layer, backend))
        layer.x[6, 3] = np.nan
        got = to_host(run(layer, backend))
        others = np.setdiff1d(np.arange(13), [6])
        assert np.isnan(got[6].astype(np.float32)).all()
        assert_same_bits(got[others], plain[others])
