"""Several grids at the same time: ranks of one process that communicate through global memory.

Each kernel here is a small form of what multi-GPU kernels do: flags, polled payloads, barriers
among an odd number of ranks. Leaving out what makes it correct must show in some schedules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from cumoe.kernels import Launch
from cumoe.launch import KernelSpec, LaunchConfig, params_dtype
from tests.host import loader
from tests.host.memory import Arena

PARAMS = params_dtype(
    [("flags", np.uint64), ("payload", np.uint64), ("out", np.uint64)]
    + [("rank", np.int32), ("ranks", np.int32)]
)
SEEDS = range(16)
SENTINEL = 0xFFFFFFFF
HEAD = """#include "sync.cuh"
using namespace cumoe;
struct Params {
  uint32_t* flags;  // shared by all ranks, zeros
  uint4* payload;   // shared by all ranks, every word 0xffffffff
  uint32_t* out;    // this rank's
  int rank, ranks;
};
extern "C" __global__ void NAME(const __grid_constant__ Params p) {
  const int t = threadIdx.x, rank = p.rank, ranks = p.ranks, block = blockIdx.x;
  (void)t, (void)rank, (void)ranks, (void)block;
#line 1
"""

Run = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.fixture
def run(tmp_path) -> Run:
    """Run one body per rank together, or one on all `ranks`; returns ``out`` of each rank."""

    def run_bodies(
        *bodies: str,
        ranks: int = 0,
        names: tuple[str, ...] = ("probe",),
        threads: int = 32,
        blocks: int = 1,
        num_out: int = 64,
        **options: int,
    ) -> np.ndarray:
        for name, body in zip(names, bodies, strict=True):
            (tmp_path / f"{name}.cu").write_text(HEAD.replace("NAME", name) + body + "\n}\n")
        ranks = ranks or len(bodies)
        with Arena() as arena:
            flags = arena.array(np.zeros(256, np.uint32))
            payload = arena.array(np.full((8192, 4), SENTINEL, np.uint32))
            outs = [arena.array(np.full(num_out, 77, np.uint32)) for _ in range(ranks)]
            launches = []
            for rank, out in enumerate(outs):
                params = np.zeros((), PARAMS)
                params["flags"], params["payload"] = flags.ctypes.data, payload.ctypes.data
                params["out"], params["rank"], params["ranks"] = out.ctypes.data, rank, ranks
                spec = KernelSpec(names[rank % len(names)], source_dir=tmp_path)
                config = LaunchConfig((blocks, 1, 1), (threads, 1, 1))
                launches.append(Launch(spec, config, params))
            loader.run_together(launches, loader.HostOptions(**options))
            return np.stack(outs)

    return run_bodies


def failures(
    run: Run,
    expected: np.ndarray,
    *bodies: str,
    message: str = "",
    seeds: Iterable[int] = SEEDS,
    **options,
) -> int:
    """Count the seeds whose run fails or gives another result."""
    count = 0
    for seed in seeds:
        try:
            count += not np.array_equal(run(*bodies, seed=seed, **options), expected)
        except loader.HostError as error:
            assert re.search(message, str(error)), error
            count += 1
    return count


class TestFlags:
    """Rank 0 writes, sets a flag, waits for the answer; rank 1 answers with twice the value."""

    PING = """
  const int other = 1 - rank;
  for (uint32_t round = 1; round <= 5; ++round) {
    if (rank == 1) {
      if (t == 0) WAIT
      __syncthreads();
    }
    const uint4 got = ptx::ld_relaxed_sys_v4(p.payload + 32 * rank + t);
    const uint32_t x = rank == 0 ? 100 * round + t : 2 * got.z;
    ptx::st_relaxed_sys_v4(p.payload + 32 * other + t, make_uint4(x, x, x, x));
    __syncthreads();
    if (t == 0) SET
    if (rank == 0) {
      if (t == 0) WAIT
      __syncthreads();
      p.out[t] = ptx::ld_relaxed_sys_v4(p.payload + t).w;
    }
    __syncthreads();
  }"""
    EXPECTED = np.stack([1000 + 2 * np.arange(32), np.full(32, 77)]).astype(np.uint32)
    ACQUIRE = "while (ptx::ld_acquire_sys(p.flags + rank) != round) {}"
    RELEASE = "ptx::st_release_sys(p.flags + other, round);"
    WAITS = {
        "acquire": ACQUIRE,
        "atomic": "while (atomicAdd(p.flags + rank, 0u) != round) {}",
        "volatile": "while (*(volatile uint32_t*)(p.flags + rank) != round) __nanosleep(64);",
        "relaxed and fence": """{
        uint4 v;
        do {
          v = ptx::ld_relaxed_sys_v4(reinterpret_cast<const uint4*>(p.flags));
        } while ((rank ? v.y : v.x) != round);
        ptx::fence_acq_rel_sys();
      }""",
    }
    SETS = {
        "store": RELEASE,
        "red": "ptx::red_add_release_sys(p.flags + other, 1);",
        "atom": "ptx::atom_add_release_sys(p.flags + other, 1);",
        "threadfence": "{ __threadfence_system(); atomicAdd(p.flags + other, 1u); }",
        "fence": "{ ptx::fence_acq_rel_sys(); atomicExch(p.flags + other, round); }",
    }

    def body(self, wait: str = ACQUIRE, set_: str = RELEASE) -> str:
        return self.PING.replace("WAIT", wait).replace("SET", set_)

    @pytest.mark.parametrize("wait", WAITS)
    @pytest.mark.parametrize("set_", SETS)
    def test_ping_pong(self, run, wait, set_):
        body = self.body(self.WAITS[wait], self.SETS[set_])
        assert failures(run, self.EXPECTED, body, ranks=2, num_out=32) == 0

    @pytest.mark.parametrize(
        ("wait", "set_"),
        [
            (ACQUIRE, "atomicExch(p.flags + other, round);"),  # relaxed: no release
            (ACQUIRE, "{ atomicExch(p.flags + other, round); ptx::fence_acq_rel_sys(); }"),
            ("{}", RELEASE),
            ("while (ptx::ld_acquire_sys(p.flags + rank) == 0) {}", RELEASE),
        ],
        ids=["no release", "fence too late", "no wait", "wait for any round"],
    )
    def test_faults(self, run, wait, set_):
        body = self.body(wait, set_)
        assert failures(run, self.EXPECTED, body, ranks=2, num_out=32) > 4

    def test_no_barrier_before_the_release(self, run):
        body = self.body().replace(
            "    __syncthreads();\n    if (t == 0) ptx::st", "    if (t == 0) ptx::st"
        )
        assert body.count("__syncthreads") == 3
        assert failures(run, self.EXPECTED, body, ranks=2, num_out=32) > 4

    def test_endless_poll_without_an_event(self, run):
        body = "while (*(volatile uint32_t*)(p.flags + 3) == 0) {}"
        with pytest.raises(loader.HostError, match=r"kernel probe, grid \d, .* makes no progress"):
            run(body, ranks=2, seconds=1)

    def test_endless_polls_of_whole_warps(self, run):
        """Warp operations in the loop are no progress either."""
        body = "while (!__all_sync(0xffffffffu, ptx::ld_acquire_sys(p.flags) == 1)) {}"
        with pytest.raises(loader.HostError, match=r"(?s)deadlock:.*grid 0.*grid 1.*probe.cu:1"):
            run(body, ranks=2)

    def test_endless_barriers(self, run):
        with pytest.raises(loader.HostError, match=r"kernel probe, grid \d, .* makes no progress"):
            run("while (ranks) __syncthreads();", ranks=2, seconds=1)


class TestPayload:
    """All-reduce by polling the payload itself: three buffers in turn, no flags."""

    LAMPORT = """
  // buffer (3, ranks, ranks, 32): of a rank, what each rank sent.
  const auto slot = [&](int buffer, int of, int from) {
    return p.payload + ((buffer * ranks + of) * ranks + from) * 32 + t;
  };
  const uint32_t none = 0xffffffffu;
  for (uint32_t round = 0; round < 7; ++round) {
    const uint32_t x = 1000 * round + 100 * rank + t;
    for (int to = 0; to < ranks; ++to) {
      ptx::st_relaxed_sys_v4(slot(round % 3, to, rank), make_uint4(x, 2 * x, 3 * x, 4 * x));
    }
    uint32_t sum = 0;
    for (int from = 0; from < ranks; ++from) {
      uint4 v;
      do {
        v = ptx::ld_relaxed_sys_v4(slot(round % 3, rank, from));
      } while (v.x == none || v.y == none || v.z == none || v.w == none);
      sum += v.x + v.y + v.z + v.w;
    }
    p.out[round * 32 + t] = sum;
    for (int from = 0; from < ranks; ++from) {
      ptx::st_relaxed_sys_v4(slot((round + 2) % 3, rank, from), make_uint4(none, none, none, none));
    }
    ptx::fence_acq_rel_sys();
  }"""

    def expected(self, ranks: int) -> np.ndarray:
        rounds, t = np.indices((7, 32))
        sums = 10 * (ranks * (1000 * rounds + t) + 100 * (ranks * (ranks - 1) // 2))
        return np.stack([sums.reshape(-1)] * ranks).astype(np.uint32)

    @pytest.mark.parametrize("ranks", [1, 2, 3, 8])
    def test_all_reduce(self, run, ranks):
        seeds = (1, 4, 11, 14) if ranks == 8 else SEEDS
        expected = self.expected(ranks)
        assert failures(run, expected, self.LAMPORT, ranks=ranks, num_out=224, seeds=seeds) == 0

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (" || v.y == none || v.z == none || v.w == none", ""),
            ("(v.x == none", "(false"),
            ("    ptx::fence_acq_rel_sys();\n", ""),
            ("slot((round + 2) % 3, rank, from), make", "slot((round + 1) % 3, rank, from), make"),
            ("round % 3", "round % 2"),
        ],
        ids=["first word only", "a word not polled", "no fence after clearing", "clears the next",
             "two buffers"],
    )  # fmt: skip
    def test_faults(self, run, old, new):
        assert old in self.LAMPORT
        body = self.LAMPORT.replace(old, new)
        assert failures(run, self.expected(3), body, ranks=3, num_out=224, message="deadlock") > 2


class TestBarrier:
    """Two-shot all-reduce among three ranks of two blocks, with two barriers a round."""

    TWO_SHOT = """
  // flags (2, ranks, blocks, ranks): of a rank's block, what each rank's same block set.
  const int blocks = gridDim.x;
  const auto barrier = [&](int phase, uint32_t epoch) {
    __syncthreads();
    if (t < ranks) {
      uint32_t* mine = p.flags + ((phase * ranks + rank) * blocks + block) * ranks;
      uint32_t* theirs = p.flags + ((phase * ranks + t) * blocks + block) * ranks;
      ptx::st_release_sys(theirs + rank, epoch);
      while (ptx::ld_acquire_sys(mine + t) < epoch) {}
    }
    __syncthreads();
  };
  // Input (ranks, blocks, 32) and sums of the same shape, by plain accesses.
  uint4* in = p.payload;
  uint4* sums = p.payload + ranks * blocks * 32;
  const int at = block * 32 + t;
  for (uint32_t epoch = 1; epoch < 5; ++epoch) {
    in[rank * blocks * 32 + at].x = 1000 * epoch + 100 * rank + at;
    barrier(0, epoch);
    // This rank's part of the columns.
    if (t % ranks == rank) {
      uint32_t sum = 0;
      for (int from = 0; from < ranks; ++from) sum += in[from * blocks * 32 + at].x;
      for (int to = 0; to < ranks; ++to) sums[to * blocks * 32 + at].x = sum;
    }
    barrier(1, epoch);
    p.out[epoch % 2 * 64 + at] = sums[rank * blocks * 32 + at].x;
  }"""
    EXPECTED = np.stack(
        [[3 * (1000 * epoch + at) + 300 for epoch in (4, 3) for at in range(64)]] * 3
    ).astype(np.uint32)
    OPTIONS = {"ranks": 3, "blocks": 2, "num_out": 128}

    def test_two_phases(self, run):
        assert failures(run, self.EXPECTED, self.TWO_SHOT, **self.OPTIONS) == 0

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("    barrier(0, epoch);\n", ""),
            ("    barrier(1, epoch);\n", ""),
            ("mine + t) < epoch", "mine + t) == 0"),
            ("if (t < ranks) {", "if (t < ranks - 1) {"),
            ("    }\n    __syncthreads();\n  };", "    }\n  };"),
            ("    __syncthreads();\n    if (t < ranks) {", "    if (t < ranks) {"),
            ("theirs + rank, epoch", "theirs + rank, epoch - (epoch == 3 && rank == 1)"),
        ],
        ids=["first", "second", "epoch", "one rank less", "block after", "block before", "signal"],
    )
    def test_faults(self, run, old, new):
        assert old in self.TWO_SHOT
        body = self.TWO_SHOT.replace(old, new)
        assert failures(run, self.EXPECTED, body, message="deadlock", **self.OPTIONS) > 2

    def test_a_rank_that_never_signals(self, run):
        body = "  if (rank == 1) return;\n" + self.TWO_SHOT
        with pytest.raises(loader.HostError) as caught:
            run(body, seed=3, **self.OPTIONS)
        text = str(caught.value)
        for rank in (0, 2):
            for block in (0, 1):
                assert f"kernel probe, grid {rank}, block ({block}, 0, 0):" in text
        waits = r"1 thread from 1 to 1: polling ld.acquire.sys at probe.cu:11 \(0x\w+, which hold"
        assert len(re.findall(waits + r"s 0x0\)", text)) == 4
        assert "30 threads" in text or "31 threads" in text
        assert "in __syncthreads at probe.cu:13" in text
        assert "kernel probe, grid 1: 2 of 2 blocks have ended" in text
        assert text.endswith("(seed 3)")

    def test_blocks_that_do_not_fit(self, run):
        """Blocks that wait for blocks which start only when they have ended."""
        body = """
  if (t == 0) {
    ptx::red_add_release_sys(p.flags, 1);
    while (ptx::ld_acquire_sys(p.flags) < ranks * gridDim.x) {}
  }"""
        assert run(body, ranks=3, blocks=4).shape == (3, 64)
        assert run(body, ranks=3, blocks=4, resident=4).shape == (3, 64)
        with pytest.raises(loader.HostError, match="1 of 4 blocks have not started, because 3 are"):
            run(body, ranks=3, blocks=4, resident=3)


class TestGrids:
    def test_different_kernels(self, run):
        """A producer with 64 threads' worth of data for a consumer of another source."""
        producer = """
  for (int k = 0; k < 4; ++k) {
    ptx::st_relaxed_sys_v4(p.payload + 32 * k + t, make_uint4(k, t, k + t, 7));
    __syncwarp();
    if (t == 0) ptx::red_add_release_sys(p.flags, 1);
  }
  p.out[t] = 1;"""
        consumer = """
  uint32_t sum = 0;
  for (uint32_t k = 0; k < 4; ++k) {
    while (ptx::ld_acquire_sys(p.flags) <= k) {}
    sum += p.payload[32 * k + t].z;
  }
  p.out[t] = sum;"""
        expected = np.stack([np.ones(32), 6 + 4 * np.arange(32)]).astype(np.uint32)
        names = ("producer", "consumer")
        assert failures(run, expected, producer, consumer, names=names, num_out=32) == 0
        stuck = consumer.replace("<= k", "<= k + 1")
        with pytest.raises(loader.HostError) as caught:
            run(producer, stuck, names=names)
        text = str(caught.value)
        assert "kernel consumer, grid 1, block (0, 0, 0):" in text
        assert "32 threads from 0 to 31: polling ld.acquire.sys at consumer.cu:4" in text
        assert "which holds 0x4)" in text and "kernel producer, grid 0: 1 of 1 blocks" in text

    def test_schedules_differ_and_repeat(self, run):
        """The order in which ranks take tickets depends on the seed, and on nothing else."""
        body = "p.out[t] = ptx::atom_add_release_sys(p.flags, 1);"

        def orders() -> list[bytes]:
            return [run(body, ranks=3, num_out=32, seed=seed).tobytes() for seed in SEEDS]

        first = orders()
        assert len(set(first)) > 12
        assert first == orders()
        owners = [run(body, ranks=3, num_out=32, seed=seed).argmin() // 32 for seed in SEEDS]
        assert set(owners) == {0, 1, 2}

    def test_faults_name_the_grid(self, run):
        with pytest.raises(loader.HostError, match="kernel probe, grid 2, block .*: __trap"):
            run("if (rank == 2 && t == 5) __trap();", ranks=3)
        with pytest.raises(loader.HostError, match=r"grid \d.*probe.cu:1.* not 16-byte aligned"):
            run("ptx::ld_relaxed_sys_v4(reinterpret_cast<uint4*>(p.flags + 1));", ranks=2)
        with pytest.raises(loader.HostError, match=r"grid \d.*invalid memory access.*probe.cu:1"):
            run("ptx::st_release_sys(reinterpret_cast<uint32_t*>(64), 1);", ranks=2)

    def test_more_ranks_than_a_host_has(self, run):
        body = """
  ptx::red_add_release_sys(p.flags, 1);
  while (ptx::ld_acquire_sys(p.flags) < 32 * ranks) {}
  p.out[t] = rank;"""
        got = run(body, ranks=16, num_out=32)
        assert (got == np.arange(16)[:, None]).all()
