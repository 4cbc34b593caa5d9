"""Several GPUs: all-reduces with NCCL's sum, as processes and as threads (see ``launched.py``)."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from cumoe.comm import (
    AllReduced,
    Epilogue,
    Quantization,
    Workspace,
    WorkspaceError,
    allreduce,
    check_same,
    finalize_allreduce,
    reduce_allreduce,
)
from cumoe.reference import allreduce as twin
from tests.helpers import BF16, rounding_bound, to_backend, to_host
from tests.test_multigpu_allreduce import replay

pytestmark = pytest.mark.multigpu

HIDDEN, TOP_K, FACTOR = 7168, 8, 2.5


def drawn(policy, num_tokens, rank, dtype=BF16):
    """A rank's positional arguments of an op, its shared output, and its part by the twin."""
    rng = np.random.default_rng((rank, num_tokens))
    shared = rng.standard_normal((num_tokens, HIDDEN)).astype(dtype)
    if policy == "plain":
        return (shared,), None, twin.part_of_values(shared)
    if policy == "experts":
        rows = rng.standard_normal((3, num_tokens, HIDDEN)).astype(dtype)
        weights = rng.random((3, num_tokens)).astype(np.float32)
        part = twin.part_of_experts(rows, weights, shared=shared)
        return (rows, weights), shared, part
    rows = rng.standard_normal((num_tokens * TOP_K, HIDDEN)).astype(dtype)
    index = rng.permutation(len(rows)).astype(np.int32).reshape(num_tokens, TOP_K)
    index[rng.random(index.shape) < 0.5] = -1
    weights = rng.random(index.shape).astype(np.float32)
    part = twin.part_of_rows(rows, weights, index, routed_scaling_factor=FACTOR, shared=shared)
    return (rows, weights, index), shared, part


def epilogue_of(num_tokens, dtype=BF16):
    """The residual and the norm's weight, the same on every rank."""
    rng = np.random.default_rng(num_tokens)
    residual = rng.standard_normal((num_tokens, HIDDEN)).astype(dtype)
    return residual, rng.standard_normal(HIDDEN).astype(dtype)


def finish(stream, seconds=60.0):
    """Wait for a stream whose kernels may wait for a rank that never comes."""
    deadline = time.monotonic() + seconds
    while not stream.done:
        assert time.monotonic() < deadline, "the GPU is not done"
        time.sleep(0.001)


OPS = {"rows": finalize_allreduce, "experts": reduce_allreduce, "plain": allreduce}


class TestNccl:
    """All-reduces with NCCL's sum in their middle: the ops, graphs, and the end of a workspace."""

    @pytest.mark.parametrize("num_tokens", [1, 17, 512])
    @pytest.mark.parametrize(
        ("policy", "dtype"), [("rows", BF16), ("experts", np.float16), ("plain", np.float32)]
    )
    def test_op(self, ranks, policy, dtype, num_tokens):
        """The sum is within its roundings; what follows has the bits of the twin on that sum."""
        import cupy

        def work(group):
            given, shared, part = drawn(policy, num_tokens, group.rank, dtype)
            residual, weight = epilogue_of(num_tokens, dtype)
            options = {} if policy == "plain" else {"shared_output": to_backend(shared, "cupy")}
            if policy == "rows":
                options["routed_scaling_factor"] = FACTOR
            after = Epilogue(
                to_backend(residual, "cupy"),
                to_backend(weight, "cupy"),
                1e-5,
                1.0,
                None if policy == "plain" else Quantization("fp8_block"),
            )
            outputs = ("sum", "residual", "norm", "quantized")[: 3 if policy == "plain" else 4]
            arrays = to_backend(given, "cupy")
            parts = group.allgather(part)
            with Workspace(group, num_tokens, HIDDEN, "float32", engine="nccl") as made:
                assert made.kind == "nccl"
                results = []
                for _ in range(3):
                    done = OPS[policy](*arrays, made, epilogue=after, outputs=outputs, **options)
                    finish(cupy.cuda.get_current_stream())
                    quantized = done.quantized
                    several = [done.sum, done.residual, done.norm]
                    if quantized is not None:
                        several += [quantized.values, quantized.scale]
                    results.append([to_host(x) for x in several])
            for again in results[1:]:
                assert all(
                    a.tobytes() == b.tobytes() for a, b in zip(again, results[0], strict=True)
                )
            total, *rest = results[0]
            exact, bound = rounding_bound(parts)
            assert (np.abs(total.astype(np.float64) - exact) <= bound).all()
            if group.size == 2:  # one addition, which can be rounded in one way only
                assert total.tobytes() == twin.reduce_parts(parts).sum.tobytes()
            want = twin.reduce_parts(
                [total],
                residual=residual,
                norm_weight=weight,
                eps=1e-5,
                weight_offset=1.0,
                quantize=None if policy == "plain" else "fp8_block",
            )
            expected = [want.result, want.norm]
            if want.quantized is not None:
                expected += [want.quantized.values, want.quantized.scale]
            for got, x in zip(rest, expected, strict=True):
                assert got.tobytes() == x.tobytes()
            digests = [hashlib.sha256(x.tobytes()).hexdigest() for x in results[0]]
            check_same(group, "results", digests)

        ranks(work)

    def test_no_token(self, ranks):
        import cupy

        def work(group):
            with Workspace(group, 4, 64, engine="nccl") as made:
                done = allreduce(cupy.zeros((0, 64), BF16), made)
                assert done.sum.shape == (0, 64)
                x = cupy.full((4, 64), group.rank + 1, np.float16)
                got = allreduce(x, made).sum.get()
            assert (got == group.size * (group.size + 1) // 2).all()

        ranks(work)

    def test_beside_peer_memory(self, ranks):
        """Both engines in turn on one stream; peer memory is what auto takes."""
        import cupy

        def work(group):
            x = cupy.full((16, HIDDEN), group.rank + 1, np.float32)
            with Workspace(group, 16, HIDDEN, "float32") as peers:
                assert peers.kind in ("ipc", "peer")
                with Workspace(group, 16, HIDDEN, "float32", engine="nccl") as made:
                    for _ in range(20):
                        x = allreduce(x, peers).sum
                        x = allreduce(x, made).sum / np.float32(group.size * group.size)
                    finish(cupy.cuda.get_current_stream())
            # All ranks have their mean after the first two sums: (n + 1) / 2 in all later ones.
            np.testing.assert_allclose(x.get(), (group.size + 1) / 2, rtol=1e-5)

        ranks(work)

    def test_graph(self, ranks):
        """Replays read what is in the captured arrays, and a replay changes nothing for others."""
        import cupy

        def work(group):
            num_tokens = 33
            stream = cupy.cuda.Stream(non_blocking=True)
            residual, weight = epilogue_of(num_tokens)
            cupy.cuda.Device().synchronize()
            with stream, Workspace(group, num_tokens, HIDDEN, engine="nccl") as made:
                x = cupy.zeros((num_tokens, HIDDEN), BF16)
                after = Epilogue(to_backend(residual, "cupy"), to_backend(weight, "cupy"))
                out = AllReduced(residual=cupy.empty_like(x), norm=cupy.empty_like(x))
                allreduce(x, made, epilogue=after, out=out)  # compiles and loads
                finish(stream)
                group.barrier()
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
                allreduce(x, made, epilogue=after, out=out)
                graph = stream.end_capture()
                for step in range(4):
                    given = drawn("plain", num_tokens, group.rank + 100 * step)[2]
                    x.view(np.uint16).set(given.view(np.uint16), stream)
                    finish(stream)
                    want = allreduce(x, made, epilogue=after, outputs=("residual", "norm"))
                    finish(stream)
                    replay(group, graph, stream)
                    for name in ("residual", "norm"):
                        a, b = to_host(getattr(out, name)), to_host(getattr(want, name))
                        assert a.tobytes() == b.tobytes() and a.view(np.uint16).any()
                    check_same(
                        group, "norm", hashlib.sha256(to_host(out.norm).tobytes()).hexdigest()
                    )
                del graph

        ranks(work)

    def test_a_graph_is_left(self, ranks):
        """Closing says so, where NCCL would wait for ever."""
        import cupy

        def work(group):
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                made = Workspace(group, 4, 64, engine="nccl", timeout_s=10)
                x = cupy.ones((4, 64), np.float16)
                out = AllReduced(cupy.empty_like(x))
                allreduce(x, made, out=out)
                finish(stream)
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
                allreduce(x, made, out=out)
                graph = stream.end_capture()
                with pytest.raises(WorkspaceError, match="no CUDA graph is left"):
                    made.close()
                del graph

        ranks(work)

    def test_abandoned(self, ranks):
        """The next workspace works."""
        import cupy

        def work(group):
            with pytest.raises(KeyError), Workspace(group, 4, 64, engine="nccl"):
                group.barrier()
                raise KeyError(3)
            with Workspace(group, 4, 64, engine="nccl") as made:
                got = allreduce(cupy.ones((4, 64), np.float16), made).sum.get()
            assert (got == group.size).all()

        ranks(work)
