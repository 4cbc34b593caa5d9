"""The models of Hopper's asynchronous machinery: what they compute, what they must notice."""

from __future__ import annotations

import re

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


class TestWgmma:
    """Two groups in flight: one product of (64, 128 bytes) by (24, 128 bytes), and two summed."""

    FILL = """
  // Operands by their definition: element (r, k) at row r, chunk (k / per_chunk) ^ (r % 8).
  constexpr int per_row = 128 / sizeof(Element), per_chunk = per_row / 8;
  auto* elements = reinterpret_cast<Element*>(smem);
  for (int e = i; e < 64 * per_row; e += 128) {
    const int r = e / per_row, k = e % per_row;
    const int at = r * per_row + ((k / per_chunk) ^ (r % 8)) * per_chunk + k % per_chunk;
    for (int half = 0; half < 2; ++half) {
      auto* w = elements + half * 8192 / sizeof(Element);
      auto* a = elements + (16384 + half * 3072) / sizeof(Element);
      w[at] = element(r + 3 * k + half);
      if (r < 24) a[at] = element(5 * r + k + half);
    }
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t w0 = wgmma::descriptor(data), w1 = wgmma::descriptor(data + 8192);
  const uint64_t a0 = wgmma::descriptor(data + 16384), a1 = wgmma::descriptor(data + 19456);
  float d[2][12];
  for (int k = 0; k < 24; ++k) d[k / 12][k % 12] = k < 12 ? 1.0f : 2.0f;
"""
    STORE = """
  const int warp = i / 32, lane = i % 32;
  for (int v = 0; v < 24; ++v) {
    const int row = warp * 16 + lane / 4 + 8 * (v / 2 % 2);
    const int column = v % 12 / 4 * 8 + 2 * (lane % 4) + v % 2;
    p.out[v / 12 * 1536 + row * 24 + column] = __float_as_int(d[v / 12][v % 12]);
  }"""
    ELEMENTS = {
        "e4m3": """
  using Element = uint8_t;
  const auto element = [](int x) { return static_cast<uint8_t>((x * 7 % 96) + 8); };
""",
        "bf16": """
  using Element = uint16_t;
  const auto element = [](int x) { return static_cast<uint16_t>((x * 7 % 96) + 0x3f80); };
""",
    }
    # Two sums, the second over both products; the first is read while the second is in flight.
    MULTIPLY = """
  wgmma::fence();
  wgmma::mma_TYPE<24>(d[0], w0, a0, false);
  wgmma::commit();
  wgmma::mma_TYPE<24>(d[1], w0, a0, true);
  wgmma::mma_TYPE<24>(d[1], w1, a1, true);
  wgmma::commit();
  wgmma::wait<1>();
  for (int k = 0; k < 12; ++k) d[0][k] += 1.0f;
  wgmma::wait<0>();
  __syncthreads();
  for (int k = i; k < 22528; k += 128) smem[k] = 0x30;
"""

    def run(self, probe, kind: str, seed: int, multiply: str = MULTIPLY, fill: str = FILL) -> bool:
        """Tell whether both sums are right."""
        body = self.ELEMENTS[kind] + fill + multiply.replace("TYPE", kind) + self.STORE
        got = probe(body, n=3072, smem=16384 + 6144, seed=seed).view(np.float32)
        k = np.arange(128 if kind == "e4m3" else 64)

        def operand(x: np.ndarray) -> np.ndarray:
            if kind == "e4m3":
                codes = (x * 7 % 96 + 8).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
            else:
                codes = (x * 7 % 96 + 0x3F80).astype(np.uint16).view(ml_dtypes.bfloat16)
            return codes.astype(np.float64)

        products = [
            operand(np.arange(64)[:, None] + 3 * k + half)
            @ operand(5 * np.arange(24)[:, None] + k + half).T
            for half in range(2)
        ]
        expected = np.stack([products[0] + 1.0, sum(products) + 2.0])
        return bool(np.allclose(got.reshape(2, 64, 24), expected, rtol=1e-6))

    @pytest.mark.parametrize("kind", ["e4m3", "bf16"])
    def test_product(self, probe, kind):
        assert all(self.run(probe, kind, seed) for seed in SEEDS)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("  wgmma::wait<0>();\n", "", "were not waited for"),
            ("  wgmma::commit();\n  wgmma::wait<1>", "  wgmma::wait<1>", "were not waited for"),
            ("wgmma::wait<0>", "wgmma::wait<1>", "were not waited for"),
            ("wgmma::wait<1>", "wgmma::wait<2>", "were written by lane 0 before this wait"),
            ("  wgmma::wait<1>();\n", "", "were written by lane 0 before this wait"),
            ("  wgmma::fence();\n", "", "probe.cu:2[0-9]: wgmma without a wgmma.fence"),
            ("(d[1], w1", "(d[0], w1", None),
            ("(d[0], w0, a0, false)", "(d[0], w0, a0, true)", None),
            ("(d[1], w0, a0, true)", "(d[1], w0, a0, false)", None),
            ("(d[1], w1, a1, true)", "(d[1], w1, a1, false)", None),
            (
                "mma_TYPE<24>(d[1], w1",
                "mma_TYPE<16>(reinterpret_cast<float(&)[8]>(d[1][4]), w1",
                "n = 16 on registers of one of n = 24 that is in flight",
            ),
            (
                "  wgmma::wait<0>();\n  __syncthreads();\n",
                "  __syncthreads();\n  wgmma::wait<0>();\n",
                None,
            ),
            (
                "  wgmma::wait<0>();\n",
                "  wgmma::wait<0>();\n  wgmma::mma_TYPE<24>(d[0], w0, a0, false);\n"
                "  wgmma::commit();\n  wgmma::wait<0>();\n",
                "wgmma without a wgmma.fence since its accumulators were free",
            ),
            (
                "  wgmma::wait<0>();\n",
                "  const float early = d[1][3];\n  wgmma::wait<0>();\n  d[1][3] = early;\n",
                None,
            ),
            ("wgmma::commit();", "if (i < 96) wgmma::commit();", "were not waited for"),
            (
                "wgmma::mma_TYPE<24>(d[1], w1, a1, true);",
                "if (i >= 32) wgmma::mma_TYPE<24>(d[1], w1, a1, true);",
                "warps 0 and 1 of a warpgroup issued different wgmma",
            ),
            (
                "wgmma::mma_TYPE<24>(d[1], w1, a1, true);",
                "wgmma::mma_TYPE<24>(d[1], w1, i % 32 == 3 ? a0 : a1, true);",
                "lanes 0 and 3 have different descriptors",
            ),
        ],
    )
    def test_faults(self, probe, old, new, message):
        assert old in self.MULTIPLY
        self.caught(probe, message, multiply=self.MULTIPLY.replace(old, new))

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("  __syncthreads();\n  const uint64_t", "  const uint64_t", None),
            ("(k / per_chunk) ^ (r % 8)", "(k / per_chunk)", None),
            ("descriptor(data + 16384)", "descriptor(data + 16512)", "not 1024-byte aligned"),
            ("descriptor(data + 19456)", "descriptor(data + 20480)", "outside the 22528 bytes"),
            ("descriptor(data + 16384)", "descriptor(data + 16384) + 1", "past the swizzled row"),
            ("descriptor(data)", "descriptor(data) ^ uint64_t{1} << 62", "only the 128-byte"),
        ],
    )
    def test_faults_of_operands(self, probe, old, new, message):
        assert old in self.FILL
        self.caught(probe, message, fill=self.FILL.replace(old, new))

    def caught(self, probe, message: str | None, **changed: str) -> None:
        """Assert that most seeds show a fault, by a wrong sum if there is no message."""
        failures = 0
        for seed in SEEDS:
            try:
                failures += not self.run(probe, "e4m3", seed, **changed)
            except loader.HostError as error:
                assert message is not None and re.search(message, str(error)), error
                failures += 1
        assert failures > len(SEEDS) // 2

    def test_too_few_warps(self, probe):
        body = """
  float d[4];
  wgmma::fence();
  wgmma::mma_e4m3<8>(d, wgmma::descriptor(data), wgmma::descriptor(data), false);"""
        with pytest.raises(loader.HostError, match="probe.cu:4: .*less than four warps"):
            probe(body, block=224)


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
