"""The peers of the GEMM bench: tables and configurations anywhere, products where torch is.

Triton's kernel runs in Triton's interpreter here; on a GPU ``tests/test_bench_gemm.py`` runs it as
the bench does.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cumoe
from bench import bench_gemm, gemm_case, gemm_errors, peers
from bench.gemm_case import find_gemm_shape, make_case
from bench.inputs import make_weights
from bench.peer_triton import CONFIGS, TritonConfig, block_slots, candidates, why_illegal

RECIPES = ("bf16", "fp8_block")
TINY = find_gemm_shape("tiny")
SMEM_LIMIT = 232448
"""Bytes of shared memory that a block may have on Hopper."""


def matrices(name: str) -> list[tuple[int, int]]:
    shape = find_gemm_shape(name)
    hidden, size = shape.hidden_size, shape.intermediate_size
    return [(2 * size, hidden), (hidden, size)]


class TestConfigs:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_every_config_is_legal_for_the_models(self, recipe):
        for name in bench_gemm.ARGUMENTS.models:
            for n, k in matrices(name):
                for config in CONFIGS[recipe]:
                    assert why_illegal(config, recipe, n, k) is None

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_table(self, recipe):
        configs = CONFIGS[recipe]
        assert len(set(map(str, configs))) == len(configs) >= 8
        assert {c.block_m for c in configs} == {16, 32, 64, 128}
        itemsize = 1 if recipe == "fp8_block" else 2
        for config in configs:
            stage = (config.block_m + config.block_n) * config.block_k * itemsize
            assert config.num_stages * stage <= SMEM_LIMIT
            assert math.log2(config.block_n).is_integer()

    def test_illegal(self):
        config = TritonConfig(64, 256, 128, 1, 4, 3)
        assert "n = 384" in str(why_illegal(config, "bf16", 384, 256))
        assert "k = 192" in str(why_illegal(config, "bf16", 512, 192))
        assert "one scale" in str(
            why_illegal(TritonConfig(64, 128, 256, 1, 4, 3), "fp8_block", 128, 256)
        )
        assert "scale blocks" in str(
            why_illegal(TritonConfig(64, 64, 64, 1, 4, 3), "fp8_block", 192, 192)
        )
        assert why_illegal(TritonConfig(64, 64, 64, 1, 4, 3), "bf16", 192, 192) is None

    @pytest.mark.parametrize(
        ("rows", "heights"),
        [
            (np.full(256, 1), {16}),
            (np.r_[np.zeros(200, int), np.full(56, 4)], {16, 32}),
            (np.full(256, 16), {16, 32, 64, 128}),
            (np.full(256, 512), {64, 128}),
            (np.full(8, 4096), {128}),
            (np.r_[np.full(128, 8), 8000], {16, 32, 64, 128}),
        ],
    )
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_heights_follow_the_load(self, recipe, rows, heights):
        found = candidates(recipe, 4096, 7168, rows)
        assert {config.block_m for config in found} == heights

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_there_is_always_one(self, recipe):
        for rows in (1, 3, 40, 128, 1000, 10**5):
            assert candidates(recipe, 1536, 2048, np.array([rows, 0, rows]))


class TestBlockSlots:
    @given(
        num_tokens=st.integers(1, 40),
        top_k=st.integers(1, 4),
        num_experts=st.integers(1, 9),
        block_m=st.sampled_from([1, 2, 16]),
        seed=st.integers(0, 99),
    )
    def test_against_loops(self, num_tokens, top_k, num_experts, block_m, seed):
        ids = np.random.default_rng(seed).integers(0, num_experts, (num_tokens, top_k))
        want_slots, want_experts = [], []
        for expert in range(num_experts):
            slots = [s for s, e in enumerate(ids.ravel()) if e == expert]
            slots += [ids.size] * (-len(slots) % block_m)
            want_slots += slots
            want_experts += [expert] * (len(slots) // block_m)
        slots, experts = block_slots(ids, num_experts, block_m)
        assert (slots.dtype, experts.dtype) == (np.int32, np.int32)
        assert (slots.tolist(), experts.tolist()) == (want_slots, want_experts)


def test_wrong_rows():
    with pytest.raises(ArithmeticError, match="it is wrong by 2.00e-02"):
        peers.check_rows("it", np.full((2, 2), 1.02), np.ones((2, 2)))
    with pytest.raises(ArithmeticError, match="nan"):
        peers.check_rows("it", np.full((2, 2), np.nan), np.ones((2, 2)))


class TestProducts:
    @pytest.fixture(autouse=True)
    def _torch(self):
        pytest.importorskip("torch")

    @pytest.fixture
    def _triton(self):  # not imported here: the peer says first that it wants the interpreter
        if not bench_gemm.is_installed("triton"):
            pytest.skip("Triton is not installed")

    # torch's grouped GEMM is bf16.
    @pytest.mark.parametrize(
        ("kind", "recipe"), [("torch", "bf16"), *(("triton", recipe) for recipe in RECIPES)]
    )
    def test_rows_are_right(self, recipe, kind, request):
        if kind == "triton":
            request.getfixturevalue("_triton")
        weights = make_weights(TINY, recipe, np, seed=0)
        case = make_case(np, TINY, weights, 30, "zipf", 0)
        case.run()
        found = {}
        for name in gemm_case.GEMMS:
            found[name], dense = bench_gemm.find_peers(case, name, [kind])
            assert dense is None and len(found[name]) == 1
        sample = gemm_errors.sample_experts(case.ids, 0)
        errors = gemm_errors.compare(case, sample, peers=bench_gemm.run_peers(case, found))
        assert bench_gemm.right_peers(found, errors) == found
        for name, group in found.items():
            for peer in group:
                assert 1e-4 < errors[f"{name} {peer}"].rms < 0.005

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.usefixtures("_triton")
    def test_every_triton_config(self, recipe, monkeypatch):
        shape = find_gemm_shape("tiny")
        weights = make_weights(shape, recipe, np, seed=1)
        case = make_case(np, shape, weights, 24, "uniform", 1)
        case.run()
        operands = case.operands("gemm1")
        n, k = operands.payloads[1].shape[1:]
        a, w = (
            x.astype(np.float32) if recipe == "bf16" else cumoe.dequantize(x)
            for x in (operands.a, operands.w)
        )
        want = np.einsum("sk,snk->sn", a[np.arange(48) // 2], w[case.ids.ravel()])
        ragged = TritonConfig(16, 64, 128, 3, 4, 2)  # the last group has fewer rows of blocks
        assert block_slots(case.ids, TINY.num_experts, 16)[1].size % 3
        legal = [c for c in CONFIGS[recipe] if why_illegal(c, recipe, n, k) is None]
        assert 256 in {c.block_n for c in legal}
        for config in (*legal, ragged):
            monkeypatch.setattr(peers, "candidates", lambda *args, config=config: [config])
            peer = peers.triton_moe(operands, on_device=False)
            assert peer.config == str(config)
            got = peers.peer_rows(np, peer, peer.run(0), np.arange(48))
            assert peers.check_rows(str(config), got, want) < 0.005

    def test_dense(self):
        found = peers.dense_products(np, 128)
        assert list(found) == ["bf16", "fp8_fast", "fp8_slow"]

    def test_cublas_reduces_in_float32(self):
        import torch

        backend = torch.backends.cuda.matmul
        before = backend.allow_bf16_reduced_precision_reduction
        rows = gemm_case.random_bf16(np, (3, 64), 0)
        got = peers.cublas_rows(np, rows, rows)
        assert backend.allow_bf16_reduced_precision_reduction == before
        wide = rows.astype(np.float32)
        np.testing.assert_allclose(got, wide @ wide.T, rtol=0.01, atol=0.05)
