"""The models of Hopper's asynchronous machinery: what they compute, what they must notice."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cumoe.kernels import Launch
from cumoe.launch import TENSOR_MAP, KernelSpec, LaunchConfig, params_dtype
from tests.host import loader
from tests.host.memory import Arena
from tests.host.tensor_map import encode_tiled

PARAMS = params_dtype([("out", np.uint64), ("n", np.int32), ("map", TENSOR_MAP)])
SEEDS = range(12)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.fixture
def probe(tmp_path):
    """Run a kernel ``probe`` of the given body; returns the int32 array ``out`` of `n` elements."""

    def run(
        body: str,
        *,
        n: int = 128,
        block: int = 128,
        cluster: int = 1,
        smem: int = 16384,
        tensor_map: np.ndarray | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        text = f"""#include "tma.cuh"
#include "wgmma.cuh"
using namespace cumoe;
struct Params {{
  int* out;
  int n;
  TensorMap map;
}};
extern "C" __global__ void probe(const __grid_constant__ Params p) {{
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ uint64_t barriers[4];
  const int i = threadIdx.x;
  const uint32_t data = ptx::smem_address(smem), barrier = ptx::smem_address(barriers);
  (void)data, (void)barrier, (void)i;
#line 1
{body}
}}
"""
        (tmp_path / "probe.cu").write_text(text)
        with Arena() as arena:
            out = arena.array(np.full(n, -7, np.int32))
            params = np.zeros((), PARAMS)
            params["out"], params["n"] = out.ctypes.data, n
            if tensor_map is not None:
                params["map"] = tensor_map
            spec = KernelSpec("probe", source_dir=tmp_path)
            config = LaunchConfig((cluster, 1, 1), (block, 1, 1), (cluster, 1, 1), smem_bytes=smem)
            loader.run([Launch(spec, config, params)], loader.HostOptions(seed=seed))
            return out.copy()

    return run


def some_fail(probe, body: str, expected: list[int], **options) -> int:
    """Count the seeds whose run fails or gives another result."""
    count = 0
    for seed in SEEDS:
        try:
            count += probe(body, seed=seed, **options).tolist() != expected
        except loader.HostError:
            count += 1
    return count


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


class TestWgmma:
    BODY = """
  // Operands by their definition: element (r, k) at row r, chunk (k / 16) ^ (r % 8).
  for (int e = i; e < 64 * 128; e += 128) {
    const int r = e / 128, k = e % 128;
    const int at = r * 128 + (((k / 16) ^ (r % 8)) << 4) + k % 16;
    smem[at] = e4m3(r + 3 * k);
    if (r < 24) smem[8192 + at] = e4m3(5 * r + k);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[64];
  for (int k = 0; k < 64; ++k) d[k] = 1.0f;
  const uint64_t a = wgmma::descriptor(data), b = wgmma::descriptor(data + 8192);
  const cumoe_host::Site site = {"probe.cu", 99};
  cumoe_host::wgmma_fence(site);
  for (int k = 0; k < 4; ++k) cumoe_host::wgmma_mma(0, 24, d, a + 2 * k, b + 2 * k, k != 0, site);
  cumoe_host::wgmma_commit(site);
  cumoe_host::wgmma_wait(0, site);
  const int warp = i / 32, lane = i % 32;
  for (int v = 0; v < 12; ++v) {
    const int row = warp * 16 + lane / 4 + 8 * (v / 2 % 2), column = v / 4 * 8 + 2 * (lane % 4) + v
    % 2; p.out[row * 24 + column] = __float_as_int(d[v]);
  }"""
    HELPER = "  const auto e4m3 = [](int x) { return static_cast<uint8_t>((x * 7 % 96) + 8); };\n"

    def run(self, probe, body: str, seed: int) -> bool:
        """Tell whether the product is right."""
        got = probe(self.HELPER + body, n=64 * 24, smem=8192 + 3072, seed=seed).view(np.float32)
        k = np.arange(128)

        def operand(x: np.ndarray) -> np.ndarray:
            codes = (x * 7 % 96 + 8).astype(np.uint8)
            return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)

        a = operand(np.arange(64)[:, None] + 3 * k)
        b = operand(5 * np.arange(24)[:, None] + k)
        return bool(np.allclose(got.reshape(64, 24), a @ b.T, rtol=1e-6))

    def test_product(self, probe):
        assert all(self.run(probe, self.BODY, seed) for seed in SEEDS)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("cumoe_host::wgmma_wait(0, site);", "", "were not waited for"),
            ("cumoe_host::wgmma_commit(site);", "", "were not waited for"),
            ("cumoe_host::wgmma_wait(0, site);", "cumoe_host::wgmma_wait(1, site);", "not waited"),
            ("cumoe_host::wgmma_fence(site);", "", "probe.cu:99: wgmma without a wgmma.fence"),
            ("  __syncthreads();\n  float", "  float", None),
            ("(k / 16) ^ (r % 8)", "(k / 16)", None),
            ("descriptor(data + 8192)", "descriptor(data + 8320)", "not 1024-byte aligned"),
            ("descriptor(data + 8192)", "descriptor(data + 9216)", "outside the 11264 bytes"),
            ("k != 0, site", "true, site", None),
            ("a + 2 * k", "a + 2 * k + 1", "past the swizzled row"),
            ("a + 2 * k", "a + 4 * k", "not 1024-byte aligned"),
        ],
    )
    def test_faults(self, probe, old, new, message):
        assert old in self.BODY
        failures = 0
        for seed in SEEDS:
            try:
                failures += not self.run(probe, self.BODY.replace(old, new), seed)
            except loader.HostError as error:
                assert message is not None and message in str(error)
                failures += 1
        assert failures > len(SEEDS) // 2


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
    ptx::mbarrier_arrive_cluster(barrier, other);
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
