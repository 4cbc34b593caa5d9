"""The models of Hopper's asynchronous machinery: what they compute, what they must notice."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.host import loader
from tests.host.probes import SEEDS, hopper_probe, some_fail
from tests.host.tensor_map import encode_tiled


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.fixture
def probe(tmp_path):
    return hopper_probe(tmp_path)


INIT = """  if (i == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init(barrier + 8, 96);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
"""


class TestMBarrier:
    RING = """
  int* word = reinterpret_cast<int*>(smem);
  int total = 0;
  for (int round = 0; round < 7; ++round) {
    if (i == 0) {
      ptx::mbarrier_wait(barrier + 8, (round & 1) ^ 1);
      *word = round * 10;
      ptx::mbarrier_arrive(barrier);
    } else if (i >= 32) {
      ptx::mbarrier_wait(barrier, round & 1);
      total += *word;
      ptx::mbarrier_arrive(barrier + 8);
    }
  }
  p.out[i] = total;"""
    EXPECTED = [0] * 32 + [210] * 96

    def test_producer_and_consumers(self, probe):
        assert some_fail(probe, INIT + self.RING, self.EXPECTED) == 0

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("ptx::mbarrier_wait(barrier, round & 1);", ""),
            ("ptx::mbarrier_wait(barrier + 8, (round & 1) ^ 1);", ""),
            ("ptx::mbarrier_wait(barrier, round & 1);", "ptx::mbarrier_wait(barrier, 0);"),
            ("(round & 1) ^ 1", "round & 1"),
            ("      ptx::mbarrier_arrive(barrier + 8);\n", ""),
        ],
        ids=["no wait for full", "no wait for empty", "phase", "first phase", "no arrival"],
    )
    def test_faults(self, probe, old, new):
        assert old in self.RING
        assert some_fail(probe, INIT + self.RING.replace(old, new), self.EXPECTED) > 8

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("ptx::mbarrier_arrive(barrier + 16);", "probe.cu:1: mbarrier .* is not initialised"),
            ("ptx::mbarrier_wait(barrier + 4, 0);", "not 8-byte aligned"),
            (
                INIT + "if (i == 0) barriers[0] = 5;\n  ptx::mbarrier_arrive(barrier);",
                "(was overwritten|more than 1 arrivals)",
            ),
            (
                INIT + "if (i == 0) for (int k = 0; k < 97; ++k) ptx::mbarrier_arrive(barrier + 8);"
                "  ptx::mbarrier_wait(barrier + 8, 1); ptx::mbarrier_wait(barrier, 0);",
                r"mbarrier wait at .*parity 0: 1 of 1 arrivals and 0 bytes are missing",
            ),
            (INIT + "ptx::mbarrier_wait(barrier, 2);", "parity 2"),
        ],
    )
    def test_reported(self, probe, body, message):
        with pytest.raises(loader.HostError, match=message):
            probe(body)

    def test_try_wait(self, probe):
        """Gives up, so that its loop may do other work, and tells when the phase is complete."""
        body = (
            INIT
            + """
  volatile int* word = reinterpret_cast<int*>(smem);
  if (i == 0) {
    while (!ptx::mbarrier_try_wait_parity(barrier + 8, 0, 0)) *word += 1;
    p.out[0] = *word > 0;
  } else if (i >= 32) {
    if (i == 32) {
      while (*word == 0) __nanosleep(1);
    }
    ptx::mbarrier_arrive(barrier + 8);
  }"""
        )
        start = "if (i == 0) *reinterpret_cast<int*>(smem) = 0;"
        assert some_fail(probe, start + body, [1] + [-7] * 127) == 0
        with pytest.raises(loader.HostError, match="mbarrier try_wait"):
            probe(start + body.replace("i == 32", "i >= 32").replace("*word += 1", ""))
        with pytest.raises(loader.HostError, match="parity 2"):
            probe(INIT + "ptx::mbarrier_try_wait_parity(barrier, 2, 0);")

    def test_opaque(self, probe):
        assert probe("*ptx::opaque(p.out + i) = i;").tolist() == list(range(128))

    def test_copies_arrive(self, probe):
        """cp.async.mbarrier.arrive.noinc arrives when the thread's copies have landed."""
        body = """
  if (i == 0) ptx::mbarrier_init(barrier, 64);
  __syncthreads();
  if (i < 64) {
    ptx::cp_async_cg_16(data + 16 * i, &p.map.opaque[0], 16);
    ptx::cp_async_mbarrier_arrive_noinc(barrier);
  } else {
    WAIT
    p.out[i] = static_cast<int>(*reinterpret_cast<uint64_t*>(smem + 16 * (i - 64)));
  }"""
        words = np.full(16, 77, np.uint64)
        expected = [-7] * 64 + [77] * 64
        wait = "ptx::mbarrier_wait(barrier, 0);"
        good, bad = body.replace("WAIT", wait), body.replace("WAIT", "")
        assert some_fail(probe, good, expected, tensor_map=words) == 0
        assert some_fail(probe, bad, expected, tensor_map=words) > 4


class TestTma:
    LOAD = """
  if (i == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 1024);
    ptx::tma_load_2d(data, &p.map, barrier, COLUMN, ROW);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int k = i; k < 1024; k += 128) p.out[k] = smem[k];"""

    def load(self, probe, column: int, row: int, swizzle: str, **options) -> np.ndarray:
        x = np.random.default_rng(1).integers(0, 256, (20, 320)).astype(np.uint8)
        words = encode_tiled(x.ctypes.data, "uint8", x.shape, x.strides, (8, 128), swizzle=swizzle)
        body = self.LOAD.replace("COLUMN", str(column)).replace("ROW", str(row))
        got = probe(body, n=1024, tensor_map=words, **options).astype(np.uint8)
        wide = np.zeros((60, 800), np.uint8)
        wide[16:36, 256:576] = x
        return got, wide[16 + row : 24 + row, 256 + column : 384 + column]

    @pytest.mark.parametrize("at", [(0, 0), (128, 8), (256, 16), (-16, -3), (400, 2)])
    def test_box(self, probe, at):
        for seed in SEEDS:
            got, expected = self.load(probe, *at, "none", seed=seed)
            assert (got.reshape(8, 128) == expected).all()

    def test_swizzle(self, probe):
        """Chunk c of row r lies at chunk c ^ r."""
        got, expected = self.load(probe, 128, 8, "128B")
        rows, chunks = np.indices((8, 8))
        assert (got.reshape(8, 8, 16)[rows, chunks ^ rows] == expected.reshape(8, 8, 16)).all()

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("ptx::mbarrier_wait(barrier, 0);", "", None),
            ("expect_tx(barrier, 1024)", "expect_tx(barrier, 1040)", "16 bytes are missing"),
            ("expect_tx(barrier, 1024)", "expect_tx(barrier, 1008)", "-16 bytes are missing"),
            ("tma_load_2d(data,", "tma_load_2d(data + 64,", "not 128-byte aligned"),
            ("tma_load_2d(data,", "tma_load_2d(data + 15616,", "outside the 16384 bytes"),
            ("&p.map", "reinterpret_cast<const TensorMap*>(smem)", "no tensor map"),
            ("ptx::mbarrier_init(barrier, 1);", "", "not initialised"),
        ],
    )
    def test_faults(self, probe, monkeypatch, old, new, message):
        assert old in self.LOAD
        monkeypatch.setattr(TestTma, "LOAD", self.LOAD.replace(old, new))
        failures = 0
        for seed in SEEDS:
            try:
                got, expected = self.load(probe, 0, 0, "none", seed=seed)
                failures += (got.reshape(8, 128) != expected).any()
            except loader.HostError as error:
                assert message is None or message in str(error)
                failures += 1
        assert failures > (0 if message is None else len(SEEDS) - 1)


class TestBulkStore:
    """Two groups of one thread: a box, and a row of bytes from the same shared memory."""

    STORE = """
  for (int k = i; k < 2048; k += 128) smem[k] = static_cast<uint8_t>(k * 5 + k / 256);
  ptx::fence_proxy_async();
  __syncthreads();
  if (i == 0) {
    ptx::tma_store_2d(&p.map, data, COLUMN, ROW);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_store(p.out, data + 1024, 512);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<1>();
    for (int k = 0; k < 1024; ++k) smem[k] = 0;
    ptx::cp_async_bulk_wait_group<0>();
    smem[0] = *reinterpret_cast<const uint8_t*>(p.out + 127);
  }
  __syncthreads();
  p.out[128 + i] = smem[0];"""

    def right(self, probe, seed: int, body: str = STORE, column: int = 0, row: int = 0) -> bool:
        x = np.zeros((20, 320), np.uint8)
        words = encode_tiled(x.ctypes.data, "uint8", x.shape, x.strides, (8, 128), swizzle="128B")
        body = body.replace("COLUMN", str(column)).replace("ROW", str(row))
        out = probe(body, n=256, tensor_map=words, seed=seed)
        k = np.arange(2048)
        smem = (k * 5 + k // 256).astype(np.uint8)
        rows, chunks = np.indices((8, 8))
        wide = np.zeros((60, 800), np.uint8)
        box = smem[:1024].reshape(8, 8, 16)[rows, chunks ^ rows].reshape(8, 128)
        wide[16 + row : 24 + row, 256 + column : 384 + column] = box
        return (
            bool((x == wide[16:36, 256:576]).all())
            and bool((out[:128].view(np.uint8) == smem[1024:1536]).all())
            and bool((out[128:] == smem[1532]).all())
        )

    @pytest.mark.parametrize("at", [(0, 0), (128, 8), (256, 16), (-16, -3), (400, 2)])
    def test_stores(self, probe, at):
        assert all(self.right(probe, seed, column=at[0], row=at[1]) for seed in SEEDS)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("    ptx::cp_async_bulk_wait_group_read<1>();\n", "", None),
            ("wait_group_read<1>", "wait_group_read<2>", None),
            ("wait_group<0>", "wait_group<1>", "1 bulk stores were not waited for"),
            ("wait_group<0>", "wait_group_read<0>", None),
            (
                "    ptx::cp_async_bulk_wait_group<0>();\n",
                "",
                "thread .0, 0, 0. ends, but 1 bulk stores were not waited for",
            ),
            (
                "512);\n    ptx::cp_async_bulk_commit_group();",
                "512);",
                "(?s)1 bulk stores were not waited for",
            ),
            ("data, COLUMN", "data + 64, COLUMN", "TMA store at shared .* not 128-byte aligned"),
            ("data, COLUMN", "data + 15616, COLUMN", "outside the 16384 bytes"),
            ("data + 1024, 512", "data + 1032, 512", "cp.async.bulk .* not 16-byte aligned"),
            ("data + 1024, 512", "data + 1024, 520", "cp.async.bulk of 520 bytes"),
            ("data + 1024, 512", "data + 16000, 512", "outside the 16384 bytes"),
            ("p.out, data", "p.out + 256, data", "probe.cu:8|invalid memory access"),
            ("&p.map", "reinterpret_cast<const TensorMap*>(smem)", "no tensor map"),
        ],
    )
    def test_faults(self, probe, old, new, message):
        assert old in self.STORE
        failures = 0
        for seed in SEEDS:
            try:
                failures += not self.right(probe, seed, self.STORE.replace(old, new))
            except loader.HostError as error:
                assert message is not None and re.search(message, str(error)), error
                failures += 1
        assert failures > (3 if message is None else len(SEEDS) - 1)


class TestCluster:
    def test_remote_arrival_and_memory(self, probe):
        body = """
  const uint32_t rank = ptx::cluster_rank();
  int* word = reinterpret_cast<int*>(smem);
  if (i == 0) ptx::mbarrier_init(barrier, 64);
  ptx::cluster_sync();
  if (i < 64) {
    const uint32_t other = (rank + 1) % 3;
    static_cast<int*>(cumoe_host::cluster_pointer(data, other, 256, {}))[i] = 100 * rank + i;
    ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, other));
  }
  ptx::mbarrier_wait(barrier, 0);
  if (i < 42) p.out[42 * rank + i] = word[63 - i];
  LAST"""
        expected = [100 * ((r + 2) % 3) + 63 - i for r in range(3) for i in range(42)] + [-7, -7]
        good = body.replace("LAST", "ptx::cluster_sync();")
        assert some_fail(probe, good, expected, cluster=3) == 0
        # A block that ends while others still write to it.
        early = good.replace("ptx::mbarrier_wait(barrier, 0);\n", "if (rank == 1) return;\n")
        assert some_fail(probe, early.replace("ptx::cluster_sync();", "", 1), [], cluster=3) == 12

    def test_asynchronous_stores(self, probe):
        body = """
  const uint32_t rank = ptx::cluster_rank();
  if (i == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_arrive_expect_tx(barrier, 4 * 128);
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  const uint32_t other = (rank + 1) % 3;
  ptx::st_async_cluster_u32(ptx::mapa(data + 4 * i, other), 1000 * rank + i,
                            ptx::mapa(barrier, other));
  ptx::mbarrier_wait_cluster(barrier, 0);
  if (i < 42) p.out[42 * rank + i] = reinterpret_cast<int*>(smem)[127 - i];"""
        expected = [1000 * ((r + 2) % 3) + 127 - i for r in range(3) for i in range(42)] + [-7, -7]
        assert some_fail(probe, body, expected, cluster=3) == 0
        for old, new, message in (
            ("  ptx::cluster_wait();\n", "", "is not initialised"),
            ("ptx::mapa(barrier, other)", "barrier", "with a barrier at"),
            ("data + 4 * i", "data + 4 * i + 2", "not aligned"),
            ("4 * 128)", "4 * 129)", "4 bytes are missing"),
            ("  ptx::mbarrier_wait_cluster(barrier, 0);\n", "", "have not landed|has ended"),
        ):
            assert old in body
            with pytest.raises(loader.HostError, match=message):
                for seed in SEEDS:
                    probe(body.replace(old, new), seed=seed, cluster=3)

    def test_own_address(self, probe):
        """An address of the block itself names it in the cluster too."""
        body = """
  if (i == 0) ptx::mbarrier_init(barrier, 128);
  ptx::cluster_sync();
  const uint32_t own = ptx::mapa(barrier, ptx::cluster_rank());
  ptx::mbarrier_arrive_cluster(i % 2 ? own : barrier);
  ptx::mbarrier_wait(barrier, 0);
  p.out[i + 128 * ptx::cluster_rank()] = i;
  ptx::cluster_sync();"""
        expected = list(range(128)) * 2
        assert some_fail(probe, body, expected, n=256, cluster=2) == 0
        for old, new, message in (
            ("ptx::cluster_rank());\n", "2);\n", "mapa of block 2 in a cluster of 2"),
            ("mbarrier_arrive_cluster(i", "mbarrier_arrive(i", "is not initialised"),
            ("mapa(barrier,", "mapa(barrier + 8,", "is not initialised"),
        ):
            with pytest.raises(loader.HostError, match=message):
                probe(body.replace(old, new), n=256, cluster=2)

    def test_multicast(self, probe):
        x = np.random.default_rng(1).integers(0, 256, (16, 128)).astype(np.uint8)
        words = encode_tiled(
            x.ctypes.data, "uint8", (1, 1, 1, *x.shape), (2048, 2048, 2048, 128, 1),
            (1, 1, 1, 8, 128),
        )  # fmt: skip
        body = """
  const uint32_t rank = ptx::cluster_rank();
  if (i == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (i == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, 2048);
    ptx::tma_load_5d_multicast(data + 1024 * rank, &p.map, barrier, 3, 0, 8 * rank, 0, 0, 0);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int k = i; k < 2048; k += 128) p.out[2048 * rank + k] = smem[k];
  ptx::cluster_sync();"""
        expected = [*x.reshape(-1).tolist()] * 2
        options = {"n": 4096, "cluster": 2, "tensor_map": words}
        assert some_fail(probe, body, expected, **options) == 0
        alone = body.replace("barrier, 3, 0", "barrier, 1 << rank, 0")
        assert some_fail(probe, alone, expected, **options) == len(SEEDS)
