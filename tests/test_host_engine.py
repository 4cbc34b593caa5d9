"""The engine that executes kernels on the CPU: what it must notice, and how it says so.

Each kernel here does one thing that is not allowed, or needs one thing that the engine must
provide.
"""

from __future__ import annotations

import numpy as np
import pytest

from cumoe.kernels import Launch
from cumoe.launch import KernelSpec, LaunchConfig, params_dtype
from tests.host import loader
from tests.host.memory import Arena

PARAMS = params_dtype([("out", np.uint64), ("in", np.uint64), ("n", np.int32)])
SEEDS = range(16)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.fixture
def probe(tmp_path):
    """Run a kernel ``probe`` on int32 arrays ``out`` and ``in`` of `n` elements."""

    def run(
        body: str,
        *,
        n: int = 64,
        block: int = 64,
        grid: int = 1,
        smem: int = 0,
        seed: int = 0,
        resident: int = 1,
        seconds: int = 60,
    ) -> np.ndarray:
        text = f"""#include "ptx.cuh"
using namespace cumoe;
struct Params {{
  int* out;
  const int* in;
  int n;
}};
extern "C" __global__ void probe(const __grid_constant__ Params p) {{
  const int i = threadIdx.x;
  (void)i;
{body}
}}
"""
        (tmp_path / "probe.cu").write_text(text)
        with Arena() as arena:
            out = arena.array(np.full(n, -7, np.int32))
            given = arena.array(np.arange(n, dtype=np.int32))
            params = np.zeros((), PARAMS)
            params["out"], params["in"], params["n"] = out.ctypes.data, given.ctypes.data, n
            spec = KernelSpec("probe", source_dir=tmp_path)
            config = LaunchConfig((grid, 1, 1), (block, 1, 1), smem_bytes=smem)
            options = loader.HostOptions(seed=seed, resident=resident, seconds=seconds)
            loader.run([Launch(spec, config, params)], options)
            return out.copy()

    return run


class TestMachine:
    def test_builtin_variables(self, probe):
        body = "p.out[blockIdx.x * blockDim.x + i] = 1000 * gridDim.x + 100 * blockIdx.x + i;"
        out = probe(body, n=96, block=32, grid=3)
        assert out.tolist() == [3000 + 100 * b + t for b in range(3) for t in range(32)]

    def test_shared_memory(self, probe):
        body = """
  extern __shared__ int all[];
  __shared__ int half[32];
  all[i] = p.in[i];
  if (i < 32) half[i] = 100 * i;
  __syncthreads();
  p.out[i] = all[63 - i] + half[i / 2];"""
        for seed in SEEDS:
            out = probe(body, smem=256, seed=seed)
            assert out.tolist() == [63 - i + 100 * (i // 2) for i in range(64)]

    def test_warp_operations(self, probe):
        body = """
  const unsigned full = 0xffffffffu;
  const int lane = i % 32;
  int x = __shfl_sync(full, i, 5) + __shfl_up_sync(full, i, 1u) - __shfl_down_sync(full, i, 2u, 8);
  x += __shfl_xor_sync(full, i, 3) + (__any_sync(full, lane == 40) ? 1000 : 0);
  x += __popc(__ballot_sync(full, lane % 3 == 0)) + __popc(__match_any_sync(full, lane / 4));
  x += static_cast<int>(__reduce_max_sync(full, static_cast<unsigned>(i)));
  if (lane < 7) x += __reduce_add_sync(0x7fu, i);
  p.out[i] = x;"""

        def expected(i: int) -> int:
            base, lane = i - i % 32, i % 32
            x = base + 5 + (i - 1 if lane else i) - (i + 2 if lane % 8 < 6 else i)
            x += base + (lane ^ 3) + 11 + 4 + base + 31
            return x + (7 * base + 21 if lane < 7 else 0)

        for seed in SEEDS:
            assert probe(body, seed=seed).tolist() == [expected(i) for i in range(64)]

    def test_atomics(self, probe):
        body = """
  for (int k = 0; k < 10; ++k) atomicAdd(&p.out[k], i);
  atomicMax(&p.out[10], i);
  if (atomicCAS(&p.out[11], -7, i) == -7) atomicExch(&p.out[12], 5);"""
        out = probe(body, grid=3, seed=2, resident=3)
        assert (out[:10] == 3 * 63 * 32 - 7).all() and out[10] == 63 and out[12] == 5

    def test_blocks_that_wait_for_each_other(self, probe):
        body = """
  if (i == 0) {
    if (blockIdx.x == 1) atomicExch(&p.out[0], 1);
    if (blockIdx.x == 0) while (atomicAdd(&p.out[0], 0) != 1) __nanosleep(20);
    p.out[1 + blockIdx.x] = 3;
  }"""
        for seed in SEEDS:
            assert probe(body, grid=2, resident=2, seed=seed)[:3].tolist() == [1, 3, 3]

    def test_schedules_differ_and_repeat(self, probe):
        """The order in which threads take tickets depends on the seed, and on nothing else."""
        body = "p.out[i] = atomicAdd(&p.out[64], 1);"
        orders = [tuple(probe(body, n=65, seed=seed)) for seed in SEEDS]
        assert len(set(orders)) > 8
        assert orders == [tuple(probe(body, n=65, seed=seed)) for seed in SEEDS]


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (
                "if (i < 40) { __syncthreads();\n } else { __syncthreads(); }",
                r"__syncthreads in divergent code: other threads of the block wait at probe.cu:12",
            ),
            (
                "if (i != 3) __syncwarp();\n __syncthreads();",
                r"(?s)deadlock in kernel probe, block",
            ),
            (
                "if (i % 32 == 9) return;\n __syncwarp();",
                r"__syncwarp\(mask 0xffffffff\).* (names lanes that have exited|names it)",
            ),
            (
                "if (i % 32 < 16) __shfl_sync(0xffffffffu, i, 0); else __syncwarp();",
                r"probe.cu:11: .* while lane \d+ is in",
            ),
            ("__shfl_sync(0x0000fff0u, i, 0);", "does not name its own lane"),
            (
                "__ballot_sync(i % 2 ? 0xffffffffu : 0x55555555u, 1);",
                "(while lane|deadlock)",
            ),
            ("p.out[i + p.n] = 1;", r"thread \(\d+, 0, 0\): invalid memory access"),
            ("p.out[i] = p.in[i + p.n];", "invalid memory access"),
            ("p.out[i] = *reinterpret_cast<const int*>(64 * p.n);", "invalid memory access"),
            ("p.out[i] = 7 / (p.in[i] - 9);", r"thread \(9, 0, 0\).*division by zero"),
            ("p.out[i] = 1 << (p.in[i] + 1);", "probe.cu:11: shift by too much"),
            ("p.out[i] = p.in[i] * 100000000;", "signed integer overflow"),
            ("int a[4] = {}; p.out[i] = a[p.in[i]];", "array index out of bounds"),
            ("p.out[i] = reinterpret_cast<const int4*>(p.in + i)->x;", "misaligned pointer"),
            ("p.out[i] = static_cast<int>(1e20f * p.in[i]);", "conversion out of range"),
            ("if (i == 5) __trap();", r"thread \(5, 0, 0\), probe.cu:11: __trap"),
            (
                "extern __shared__ int s[];\n s[i] = 0;",
                "byte 252 of dynamic shared memory was written, the launch has 252|byte",
            ),
            (
                "ptx::cp_async_cg_16(ptx::smem_address(&p), p.in, 16);",
                "is not in shared memory",
            ),
            (
                "__shared__ int4 s[4];\n ptx::cp_async_cg_16(ptx::smem_address(s) + 8, p.in, 16);",
                "probe.cu:12: cp.async .*: not 16-byte aligned",
            ),
            (
                "extern __shared__ int4 s[];\n uint32_t r[4];\n"
                "  ptx::ldmatrix_x4(r, ptx::smem_address(s) + 4096 + 16 * (i % 32));",
                "probe.cu:13: shared address .* outside the 252 bytes",
            ),
        ],
    )
    def test_reported(self, probe, body, message):
        with pytest.raises(loader.HostError, match=message):
            probe(body, smem=252)

    def test_deadlock_says_who_waits_where(self, probe):
        with pytest.raises(loader.HostError) as caught:
            probe("if (i >= 32) return;\n  if (i != 3) __syncwarp();\n  __syncthreads();")
        text = str(caught.value)
        assert "31 threads from 0 to 31: in __syncwarp(mask 0xffffffff) at probe.cu:12" in text
        assert "1 thread from 3 to 3: in __syncthreads at probe.cu:13" in text
        assert "32 threads from 32 to 63: exited" in text and "(seed 0)" in text

    def test_the_end_is_no_deadlock(self, probe):
        """However many steps a block takes: the engine looks for a deadlock at some of them."""
        body = "for (int k = 0; k < 4080 + blockIdx.x; ++k) __nanosleep(1);"
        assert (probe(body + " p.out[blockIdx.x] = 3;", n=32, block=1, grid=32) == 3).all()

    def test_polling_for_ever(self, probe):
        with pytest.raises(loader.HostError, match="deadlock, all threads poll"):
            probe("while (atomicAdd(&p.out[0], 0) != 1) __nanosleep(20);", block=32)
        with pytest.raises(loader.HostError, match="(?s)deadlock.*__nanosleep at probe.cu:11"):
            probe(
                "while (atomicAdd(&p.out[0], 0) != 1) __nanosleep(20);",
                block=32, grid=2, resident=2,
            )  # fmt: skip

    def test_endless_loop(self, probe):
        body = "volatile int k = 0;\n  while (k >= 0) k = k & 1;"
        with pytest.raises(loader.HostError, match="makes no progress"):
            probe(body, seconds=1)

    def test_engine_works_after_an_error(self, probe):
        with pytest.raises(loader.HostError):
            probe("__trap();")
        assert probe("p.out[i] = i;").tolist() == list(range(64))

    def test_compile_error_shows_the_compiler(self, probe):
        with pytest.raises(
            loader.HostCompileError, match="probe.cu:11:.*undeclared|was not declared"
        ):
            probe("p.out[i] = nowhere;")


class TestFaults:
    """A missing synchronisation must change results or be reported, in some schedule."""

    def caught(self, probe, body: str, expected: list[int], **sizes: int) -> int:
        """Count the seeds that show the fault."""
        count = 0
        for seed in SEEDS:
            try:
                count += probe(body, seed=seed, **sizes).tolist() != expected
            except loader.HostError:
                count += 1
        return count

    def test_missing_block_barrier(self, probe):
        body = "__shared__ int s[64];\n  s[i] = p.in[i];\n  SYNC\n  p.out[i] = s[i ^ 32];"
        expected = [i ^ 32 for i in range(64)]
        assert self.caught(probe, body.replace("SYNC", "__syncthreads();"), expected) == 0
        assert self.caught(probe, body.replace("SYNC", ""), expected) == len(SEEDS)
        assert self.caught(probe, body.replace("SYNC", "__syncwarp();"), expected) > 8

    def test_missing_barrier_before_reuse(self, probe):
        body = """
  __shared__ int s[64];
  s[i] = i;
  __syncthreads();
  const int x = s[i ^ 1];
  SYNC
  s[i] = 99;
  p.out[i] = x;"""
        expected = [i ^ 1 for i in range(64)]
        assert self.caught(probe, body.replace("SYNC", "__syncwarp();"), expected) == 0
        assert self.caught(probe, body.replace("SYNC", ""), expected) > 8

    @pytest.mark.parametrize(
        ("wait", "good"),
        [
            ("ptx::cp_async_wait_group<0>(); __syncthreads();", True),
            ("__syncthreads();", False),
            ("ptx::cp_async_wait_group<1>(); __syncthreads();", False),
            ("ptx::cp_async_wait_group<0>();", False),
        ],
    )
    def test_asynchronous_copy(self, probe, wait, good):
        body = f"""
  __shared__ __align__(16) int s[256];
  const int valid = i == 63 ? 4 : 16;
  ptx::cp_async_cg_16(ptx::smem_address(s + 4 * i), p.in + 4 * i, valid);
  ptx::cp_async_commit_group();
  {wait}
  for (int k = 0; k < 4; ++k) p.out[4 * i + k] = s[4 * ((i + 33) % 64) + k];"""
        shifted = np.roll(np.where(np.arange(256) > 252, 0, np.arange(256)), -132).tolist()
        caught = self.caught(probe, body, shifted, n=256)
        assert caught == 0 if good else caught > 4

    def test_unwritten_shared_memory(self, probe):
        body = "__shared__ int s[64];\n  if (i < 63) s[i] = 0;\n  p.out[i] = s[i];"
        assert self.caught(probe, body, [0] * 64) == len(SEEDS)


def test_arena_notices_writes_in_front():
    with pytest.raises(AssertionError, match="bytes beside an array"), Arena() as arena:
        array = arena.array(np.zeros(5, np.int32))
        whole = np.frombuffer((np.ctypeslib.ctypes.c_int * 6).from_address(array.ctypes.data - 4))
        whole.view(np.int32)[0] = 3


def test_without_a_compiler(monkeypatch):
    """The tests are skipped with the reason, but fail where CI is set."""
    monkeypatch.setattr(loader, "compiler", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"needs a C\+\+17 compiler"):
        loader.require()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"needs a C\+\+17 compiler"):
        loader.require()
