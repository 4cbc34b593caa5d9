"""``MoELayer(group=...)`` on NumPy, ranks as threads: sums to the bit, what ranks must share."""

from __future__ import annotations

import numpy as np
import pytest

import cumoe
from cumoe import ExpertShard, MoELayer
from cumoe.comm import AllReduced, Epilogue, SingleGroup
from tests.comm_fakes import good, outcomes
from tests.helpers import BF16, assert_same_bits
from tests.rank_layers import (
    HIDDEN,
    MAX_TOKENS,
    ROUTING,
    SPLITS,
    Split,
    check_calls,
    drawn,
    make_layer,
)

TOKENS = (9, 0)
UNEVEN = {
    2: [Split(counts=(11, 1)), Split(counts=(12, 0), shared="one")],
    3: [Split(counts=(5, 0, 7)), Split(counts=(1, 10, 1), shared="one")],
    4: [Split("both")],
}


@pytest.fixture(scope="module", params=["bf16", "fp8_block"])
def random(request):
    return drawn(request.param, max(TOKENS))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_sum_over_ranks(size, random):
    for split in [*SPLITS.values(), *UNEVEN.get(size, [])]:
        if split.kind == "columns" and size > 3:
            continue  # three blocks of columns
        good(outcomes(size, lambda group, s=split: check_calls(group, random, s, "numpy", TOKENS)))


def test_given_routing(random):
    topk = cumoe.route(random.logits, ROUTING, bias=random.bias)
    columns = np.s_[:, : ROUTING.top_k]
    topk = cumoe.TopK(*(np.ascontiguousarray(a[columns]) for a in topk))

    def work(group):
        layer = make_layer(group, random, Split(), "numpy")
        assert_same_bits(layer(random.x, topk=topk), layer(random.x, random.logits))

    good(outcomes(2, work))


def test_chosen_outputs(random):
    """Any of them, into arrays of the caller's."""
    layer = make_layer(SingleGroup(), random, Split(), "numpy")
    x, logits = random.x, random.logits
    residual = np.ones((len(x), HIDDEN), BF16)
    everything = layer(x, logits, epilogue=Epilogue(residual), outputs=["sum", "residual"])
    assert_same_bits(everything.sum, layer(x, logits))
    assert layer(x, logits, outputs=["sum"]).residual is None
    out = AllReduced(residual=np.empty_like(residual))
    assert layer(x, logits, epilogue=Epilogue(residual), out=out) is out
    assert_same_bits(out.residual, everything.residual)


def test_arguments_of_a_call(random):
    layer = make_layer(SingleGroup(), random, Split(), "numpy")
    alone = MoELayer(random.weights, ROUTING, max_num_tokens=64)
    x, logits = random.x, random.logits
    for name, value in (("shared_output", x), ("epilogue", Epilogue()), ("outputs", ["sum"])):
        with pytest.raises(ValueError, match=f"{name}: expected None without a group"):
            alone(x, logits, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: expected None without a group"):
            layer(x, logits, finalize=False, **{name: value})
    with pytest.raises(TypeError, match="finalize: expected a bool"):
        layer(x, logits, finalize="yes")
    with pytest.raises(TypeError, match="out.sum: expected dtype bfloat16"):
        layer(x, logits, out=np.empty((len(x), HIDDEN), np.float32))
    with pytest.raises(ValueError, match="shared_output: expected shape"):
        layer(x, logits, shared_output=x[1:])
    with pytest.raises(TypeError, match="out: expected an AllReduced"):
        layer(x, logits, outputs=None, epilogue=Epilogue(), out=np.empty((len(x), HIDDEN), BF16))
    with pytest.raises(ValueError, match="out: expected None with finalize=False"):
        layer(x, logits, finalize=False, out=np.empty((len(x), HIDDEN), BF16))


def refused(size, random, shards, **options):
    """What every rank raises when its layer is made with one of these shards."""

    def work(group):
        shard = shards[group.rank]
        held = random.weights.shard(shard, 1) if shard else random.weights
        changed = {name: values[group.rank] for name, values in options.items()}
        MoELayer(held, ROUTING, group=group, shard=shard, **{"max_num_tokens": 32} | changed)

    found = outcomes(size, work)
    assert all(isinstance(error, ValueError) for error in found), found
    assert len({str(error) for error in found}) == 1
    return str(found[0])


def test_ranks_that_do_not_fit_together(random):
    even = [ExpertShard.even(12, r, 2) for r in range(2)]
    told = refused(2, random, even, max_num_tokens=(32, 33))
    assert "expected the same on every rank" in told and "33" in told
    gap = [ExpertShard(0, 6, 0, 2), ExpertShard(7, 5, 1, 2)]
    assert "expert 0 on 1 and expert 6 on 0" in refused(2, random, gap)
    overlap = [ExpertShard(0, 6, 0, 2), ExpertShard(5, 7, 1, 2)]
    assert "expert 0 on 1 and expert 5 on 2" in refused(2, random, overlap)
    same_rank = [ExpertShard(0, 6, 0, 2), ExpertShard(6, 6, 0, 2)]
    assert "got that of rank 1 0 times of 2" in refused(2, random, same_rank)
    for setting, times in (("all", 2), ("none", 0)):
        both = [ExpertShard.even(12, r, 2, setting) for r in range(2)]
        assert f"1 times over all ranks, as routed experts do, got {times}" in refused(
            2, random, both
        )
    nobody = [ExpertShard(1, 0, r, 2) for r in range(2)]
    assert "expert 0 on 0" in refused(2, random, nobody)


def test_no_group(random):
    with pytest.raises(TypeError, match="group: expected rank, size, allgather"):
        MoELayer(random.weights, ROUTING, max_num_tokens=MAX_TOKENS, group=3)
