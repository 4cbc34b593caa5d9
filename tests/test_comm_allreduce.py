"""The all-reduce ops: twins against float64, ranks as threads, and the launches of a workspace."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cumoe
from cumoe import kernels_comm
from cumoe.comm import (
    AllReduced,
    Epilogue,
    Quantization,
    SingleGroup,
    allreduce,
    finalize_allreduce,
    layout,
    reduce_allreduce,
    run_ranks,
)
from cumoe.comm.layout import SENTINEL, STATE_WORDS, block_layout, workspace_bytes
from cumoe.kernels_comm import Tokens, resident_clusters, select_config
from cumoe.reference import allreduce as twin
from tests.helpers import BF16
from tests.host import loader

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
RNG = np.random.default_rng
MODULE = import_module("cumoe.comm.allreduce")  # the function has its name


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = BF16) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def routed(seed: int, num_tokens: int, hidden: int, top_k: int = 4) -> dict[str, np.ndarray]:
    """Return one rank's inputs of finalize_allreduce."""
    rng = RNG(seed)
    count = num_tokens * top_k
    index = rng.permutation(count + 2)[:count].astype(np.int32).reshape(num_tokens, top_k)
    index[rng.random(index.shape) < 0.4] = -1
    return {
        "rows": normal(rng, (count + 2, hidden)),
        "topk_weights": rng.random((num_tokens, top_k)).astype(np.float32),
        "permuted_idx": index,
        "shared_output": normal(rng, (num_tokens, hidden)),
    }


def exact(
    ranks: list[dict[str, np.ndarray]], factor: float, e: Epilogue
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return sum, residual and norm in float64, and how far roundings to bfloat16 may move them."""
    total, sizes = 0.0, 0.0
    for r in ranks:
        rows, weights = r["rows"].astype(np.float64), r["topk_weights"].astype(np.float64)
        part = r["shared_output"].astype(np.float64)
        for t, k in np.argwhere(r["permuted_idx"] >= 0):
            part[t] += factor * weights[t, k] * rows[r["permuted_idx"][t, k]]
        total, sizes = total + part, sizes + np.abs(part)
    z = total + e.residual.astype(np.float64)
    mean = (z * z).mean(axis=1, keepdims=True)
    weight = e.weight_offset + e.norm_weight.astype(np.float64)
    norm = z / np.sqrt(mean + e.eps) * weight
    # Half a unit in the last place of each part and of the result; the norm's factor moves by less
    # than a part in 2^8, and the norm is rounded itself.
    moved = {"sum": 2.0**-8 * (sizes + np.abs(total)), "residual": 2.0**-8 * (sizes + np.abs(z))}
    moved["norm"] = moved["residual"] * np.abs(norm / z) + np.abs(norm) * 2.0**-7
    return {"sum": total, "residual": z, "norm": norm}, moved


class TestTwin:
    @pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
    def test_against_float64(self, num_ranks):
        """Within the roundings that are promised, and all ranks the same."""
        num_tokens, hidden = 7, 1032
        ranks = [routed(r, num_tokens, hidden) for r in range(num_ranks)]
        rng = RNG(99)
        e = Epilogue(normal(rng, (num_tokens, hidden)), normal(rng, (hidden,)), 1e-5, 1.0)
        want, moved = exact(ranks, 2.5, e)
        results = run_ranks(
            num_ranks,
            lambda group: finalize_allreduce(
                ranks[group.rank]["rows"],
                ranks[group.rank]["topk_weights"],
                ranks[group.rank]["permuted_idx"],
                group,
                shared_output=ranks[group.rank]["shared_output"],
                routed_scaling_factor=2.5,
                epilogue=e,
                outputs=("sum", "residual", "norm"),
            ),
        )
        for name, values in want.items():
            for result in results:
                got = getattr(result, name)
                assert got.tobytes() == getattr(results[0], name).tobytes()
                error = np.abs(got.astype(np.float64) - values)
                assert (error <= 1.001 * moved[name] + 1e-6).all(), name
                rms = np.sqrt((error**2).mean() / (values**2).mean())
                assert rms < 2.0**-8, (name, rms)

    def test_order_of_squares(self):
        """The mean is that of the squares, and does not depend on columns that are not there."""
        x = RNG(0).standard_normal((3, 9000)).astype(np.float32)
        for columns in (8, 256, 264, 8192, 9000):
            got = twin.mean_square(np.ascontiguousarray(x[:, :columns]))
            want = np.square(x[:, :columns].astype(np.float64)).mean(axis=1)
            assert np.allclose(got, want, rtol=3e-7, atol=0)

    def test_quantised_output_is_that_of_the_op(self):
        """The quantised output has the bits of the public op on the norm."""
        rng = RNG(3)
        x, weight = normal(rng, (5, 256)), normal(rng, (256,))
        scale = np.array([0.02], np.float32)
        ops = {
            Quantization("fp8_block"): cumoe.quantize_fp8_block,
            Quantization("fp8_token"): cumoe.quantize_fp8_token,
            Quantization("fp8_tensor", scale): lambda n: cumoe.quantize_fp8_tensor(n, scale=scale),
            Quantization("fp8_ue8m0", group_size=64): lambda n: cumoe.quantize_fp8_ue8m0(
                n, group_size=64
            ),
            Quantization("nvfp4", scale, layout="swizzled_128x4"): lambda n: cumoe.quantize_nvfp4(
                n, global_scale=scale, layout="swizzled_128x4"
            ),
        }
        for quantization, op in ops.items():
            e = Epilogue(norm_weight=weight, quantization=quantization)
            done = allreduce(x, SingleGroup(), epilogue=e)
            want = op(done.norm)
            assert type(want) is type(done.quantized)
            for name in ("values", "scale"):
                a, b = getattr(done.quantized, name), getattr(want, name)
                assert a.shape == b.shape and a.tobytes() == b.tobytes(), (quantization, name)

    def test_experts_are_rows(self):
        """One row for each expert and token is what slots in the order of experts would give."""
        rng = RNG(4)
        rows, weights = normal(rng, (3, 5, 40)), rng.random((3, 5)).astype(np.float32)
        index = np.arange(15, dtype=np.int32).reshape(3, 5).T.copy()
        a = reduce_allreduce(rows, weights, SingleGroup())
        b = finalize_allreduce(rows.reshape(15, 40), weights.T.copy(), index, SingleGroup())
        assert a.sum.tobytes() == b.sum.tobytes()

    def test_signs_of_zeros_are_lost(self):
        x = np.full((2, 8), -0.0, np.float16)
        got = allreduce(
            x, SingleGroup(), epilogue=Epilogue(residual=x), outputs=["residual", "sum"]
        )
        assert not got.sum.view(np.uint16).any() and not got.residual.view(np.uint16).any()

    def test_no_token(self):
        x = np.zeros((0, 16), BF16)
        e = Epilogue(x, np.ones(16, BF16), quantization=Quantization("fp8_token"))
        got = allreduce(x, SingleGroup(), epilogue=e)
        assert got.norm.shape == (0, 16) and got.quantized.scale.shape == (0, 1)

    def test_out(self):
        """Outputs are written in place, the residual over its input."""
        rng = RNG(5)
        x, residual, weight = normal(rng, (3, 24)), normal(rng, (3, 24)), normal(rng, (24,))
        want = allreduce(x, SingleGroup(), epilogue=Epilogue(residual.copy(), weight))
        out = AllReduced(residual=residual, norm=np.empty_like(x))
        got = allreduce(x, SingleGroup(), epilogue=Epilogue(residual, weight), out=out)
        assert got is out and got.sum is None
        assert residual.tobytes() == want.residual.tobytes()
        assert out.norm.tobytes() == want.norm.tobytes()

    def test_ranks_that_differ(self, monkeypatch):
        monkeypatch.delenv("CUMOE_DEBUG_COMM", raising=False)

        def call(group):
            return allreduce(np.zeros((2 + group.rank, 8), BF16), group)

        with pytest.raises(Exception, match=r"shape \(2, 8\).*\(3, 8\)|shape \(3, 8\).*\(2, 8\)"):
            run_ranks(2, call)


class TestLayout:
    @pytest.mark.parametrize("num_ranks", [2, 3, 4, 8, 16])
    @pytest.mark.parametrize("num_tokens", [1, 2, 15, 128, 1000])
    def test_parts_fit(self, num_ranks, num_tokens):
        row = 7168 * 2
        at = block_layout(num_ranks, num_tokens, 7168)
        assert at.num_bytes == 3 * at.buffer_bytes == workspace_bytes(num_ranks, num_tokens, 7168)
        assert all(v % 128 == 0 for v in vars(at).values())
        assert (num_ranks - 1) * at.slot_bytes <= at.buffer_bytes
        if num_tokens * row > at.slot_bytes:
            assert at.share_bytes >= -(-num_tokens // num_ranks) * row
            assert at.results_offset >= (num_ranks - 1) * at.share_bytes
            assert at.results_offset + num_tokens * row <= at.buffer_bytes

    def test_one_rank_needs_none(self):
        assert workspace_bytes(1, 4096, 7168) == 0

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ((17, 1, 8), "world_size: expected 1 to 16, got 17"),
            ((0, 1, 8), "world_size"),
            ((2, 0, 8), "max_num_tokens: expected at least 1, got 0"),
            ((2, 1, 12), "hidden_size: expected a multiple of 8, got 12"),
            ((2, 1, 8, "float64"), "dtype: expected one of .*'float64'"),
        ],
    )
    def test_bad_sizes(self, sizes, message):
        with pytest.raises(ValueError, match=message):
            workspace_bytes(*sizes)


class TestConfig:
    @pytest.mark.parametrize("hidden", [8, 264, 2048, 2880, 7168, 8192, 16384, 65536])
    @pytest.mark.parametrize("num_tokens", [1, 16, 64, 128, 129, 4096])
    def test_all_columns_and_all_resident(self, hidden, num_tokens):
        for num_sms, max_cluster in ((132, 8), (16, 8), (108, 1)):
            if max_cluster == 1 and hidden > 16384:
                with pytest.raises(ValueError, match="hidden_size: expected at most 16384"):
                    select_config(num_tokens, hidden, num_sms, max_cluster)
                continue
            c = select_config(num_tokens, hidden, num_sms, max_cluster)
            assert c.cluster * c.warps * c.vecs * kernels_comm.CHUNK >= hidden
            assert 1 <= c.num_clusters <= num_tokens and c.cluster <= max_cluster
            assert c.num_clusters <= resident_clusters(c.cluster, c.warps, num_sms)
            assert c.threads * c.blocks_per_sm <= 512


class TestLaunches:
    """What a call with a workspace would launch, run on the CPU."""

    @pytest.fixture(autouse=True)
    def _compiler(self):
        loader.require()

    @pytest.mark.parametrize(
        ("num_ranks", "num_tokens", "kernel", "count"),
        [
            (2, 5, "allreduce_one_shot", 1),
            (3, 2, "allreduce_one_shot", 1),
            (3, 5, "allreduce_two_shot", 2),
        ],
    )
    def test_of_a_workspace(self, monkeypatch, num_ranks, num_tokens, kernel, count):
        hidden, most = 264, 6
        monkeypatch.setitem(layout.ONE_SHOT_BYTES, 3, 2 * hidden * 2)
        device: Any = SimpleNamespace(num_sms=2, compute_capability=(9, 0))
        words = workspace_bytes(num_ranks, most, hidden) // 4
        blocks = [np.full(words + 4, SENTINEL, np.uint32) for _ in range(num_ranks)]
        states = [np.zeros(STATE_WORDS, np.int32) for _ in range(num_ranks)]
        ranks = [routed(r, num_tokens, hidden) for r in range(num_ranks)]
        rng = RNG(7)
        residual, weight = normal(rng, (num_tokens, hidden)), normal(rng, (hidden,))
        streams, outs = [], []
        buffers = tuple(b.ctypes.data + -b.ctypes.data % 16 for b in blocks)
        for rank, given in enumerate(ranks):
            workspace: Any = SimpleNamespace(
                group=SimpleNamespace(rank=rank, size=num_ranks),
                buffers=buffers,
                state=states[rank],
                max_num_tokens=most,
                hidden_size=hidden,
                dtype="bfloat16",
                kind="ipc",
                debug=False,
            )
            out = AllReduced(*(np.zeros((num_tokens, hidden), BF16) for _ in range(3)))
            tokens = Tokens(
                "rows",
                given["rows"],
                given["topk_weights"],
                given["permuted_idx"],
                given["shared_output"],
                residual=residual,
                norm_weight=weight,
            )
            launches = MODULE.plan_launches(tokens, out, workspace, device)
            assert [launch.spec.name for launch in launches] == [kernel] * count
            streams.append(launches)
            outs.append(out)
        loader.run_streams(streams, loader.HostOptions(seed=3))
        parts = [
            twin.part_of_rows(
                g["rows"], g["topk_weights"], g["permuted_idx"], shared=g["shared_output"]
            )
            for g in ranks
        ]
        want = twin.reduce_parts(parts, residual=residual, norm_weight=weight)
        for out in outs:
            assert out.sum.tobytes() == want.sum.tobytes()
            assert out.residual.tobytes() == want.result.tobytes()
            assert out.norm.tobytes() == want.norm.tobytes()
        assert all((b == SENTINEL).all() for b in blocks)
