"""Device arrays of PyTorch, JAX and the CUDA array interface: in, out, and in stream order."""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cumoe
from cumoe import ExpertWeights, MoELayer, Quantized, Routing, TopK
from tests.brute_force import Layer, random_layer
from tests.helpers import BF16, FP8, assert_same_bits, to_backend, to_host

pytestmark = pytest.mark.gpu

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ROUTING = Routing("renormalize", num_experts=6, top_k=2, num_shared_experts=1)
RECIPES = ["bf16", "fp8_block"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def draw(rng: np.random.Generator, recipe: str, **sizes: int) -> Layer:
    """Draw a small layer."""
    return random_layer(rng, ROUTING, recipe, **({"num_tokens": 21, "hidden_size": 128} | sizes))


def native(layer: Layer) -> Any:
    """Return the result from CuPy arrays."""
    x, logits, weights = (to_backend(a, "cupy") for a in (layer.x, layer.logits, layer.weights))
    return cumoe.moe(x, logits, weights, routing=ROUTING)


def arrays_of(weights: ExpertWeights) -> list[np.ndarray]:
    """Return the arrays of host weights that there are."""
    arrays = (weights.w13, weights.w2, weights.w13_scale, weights.w2_scale)
    return [a for a in arrays if a is not None]


class TestTorch:
    @pytest.fixture
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    @staticmethod
    def tensor(torch: Any, x: np.ndarray, **options: Any) -> Any:
        """Return a CUDA tensor with the array's bits and dtype."""
        if x.dtype == BF16:
            return torch.from_numpy(x.view(np.int16)).cuda().view(torch.bfloat16)
        if x.dtype == FP8:
            return torch.from_numpy(x.view(np.uint8)).cuda().view(torch.float8_e4m3fn)
        return torch.from_numpy(x).cuda()

    @each_recipe
    def test_layer(self, rng, torch, recipe):
        """bfloat16 and float32 tensors, fp8 weights; the result goes back without a copy."""
        layer = draw(rng, recipe)
        weights = ExpertWeights(
            *(self.tensor(torch, a) for a in arrays_of(layer.weights)), gate_up_order="gate_up"
        )
        x, logits = self.tensor(torch, layer.x), self.tensor(torch, layer.logits)
        y = cumoe.moe(x, logits, weights, routing=ROUTING)
        assert_same_bits(y, native(layer))
        back = torch.from_dlpack(y)
        assert back.dtype == torch.bfloat16 and back.data_ptr() == y.data.ptr
        assert_same_bits(back.view(torch.int16).cpu().numpy().view(BF16), to_host(y))

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_dtypes_of_x(self, rng, torch, dtype):
        layer = draw(rng, "fp8_block")
        layer.x = layer.x.astype(np.float32).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        x = self.tensor(torch, layer.x)
        weights = to_backend(layer.weights, "cupy")
        y = cumoe.moe(x, self.tensor(torch, layer.logits), weights, routing=ROUTING)
        assert_same_bits(y, native(layer))

    @pytest.mark.parametrize("column_major", [False, True])
    def test_quantized(self, rng, torch, column_major):
        layer = draw(rng, "fp8_block", hidden_size=400)
        q = cumoe.quantize_fp8_block(layer.x)
        scale = self.tensor(torch, q.scale)
        if column_major:
            scale = scale.t().contiguous().t()
        x = Quantized(self.tensor(torch, q.values), scale)
        weights = to_backend(layer.weights, "cupy")
        y = cumoe.moe(x, self.tensor(torch, layer.logits), weights, routing=ROUTING)
        assert_same_bits(y, native(layer))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_out_is_written_in_place(self, rng, torch, dtype):
        layer = draw(rng, "bf16")
        weights = to_backend(layer.weights, "cupy")
        out = torch.full((21, 128), float("nan"), dtype=getattr(torch, dtype), device="cuda")
        address = out.data_ptr()
        x, logits = self.tensor(torch, layer.x), self.tensor(torch, layer.logits)
        assert cumoe.moe(x, logits, weights, routing=ROUTING, out=out) is out
        assert out.data_ptr() == address
        np.testing.assert_array_equal(
            out.to(torch.bfloat16).float().cpu().numpy(), to_host(native(layer)).astype(np.float32)
        )

    def test_ops(self, rng, torch):
        """Routing, grouping and finalize take tensors and fill tensors."""
        layer = draw(rng, "bf16")
        logits = self.tensor(torch, layer.logits)
        out = TopK(
            torch.empty((21, 3), dtype=torch.int32, device="cuda"),
            torch.empty((21, 3), dtype=torch.float32, device="cuda"),
        )
        assert cumoe.route(logits, ROUTING, out=out) is out
        ids, weights = cumoe.route(layer.logits, ROUTING)
        np.testing.assert_array_equal(out.ids.cpu().numpy(), ids)
        np.testing.assert_array_equal(out.weights.cpu().numpy(), weights)
        permutation = cumoe.group(out, num_experts=6, num_shared_experts=1, tile=16)
        want = cumoe.group(ids, num_experts=6, num_shared_experts=1, tile=16)
        np.testing.assert_array_equal(to_host(permutation.token_idx), want.token_idx)

    def test_no_tokens(self, rng, torch):
        layer = draw(rng, "fp8_block")
        weights = to_backend(layer.weights, "cupy")
        x, logits = (self.tensor(torch, a[:0]) for a in (layer.x, layer.logits))
        assert cumoe.moe(x, logits, weights, routing=ROUTING).shape == (0, 128)

    def test_gradients_are_refused(self, torch):
        logits = torch.zeros((3, 6), device="cuda", requires_grad=True)
        with pytest.raises(ValueError, match="logits: expected a tensor without gradient"):
            cumoe.route(logits, ROUTING)

    @each_recipe
    def test_producer_on_another_stream(self, rng, torch, recipe):
        """What the tensor's stream still has to write is waited for, on the device only."""
        import cupy

        layer = draw(rng, recipe)
        weights = to_backend(layer.weights, "cupy")
        planned = MoELayer(weights, ROUTING, max_num_tokens=21)
        good, logits = self.tensor(torch, layer.x), self.tensor(torch, layer.logits)
        x = torch.zeros_like(good)
        want = to_host(planned(good, logits))
        out = cupy.empty((21, 128), BF16)
        consumer, side = cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()
        for delay in (1, 1_000_000_000):
            x.zero_()
            torch.cuda.synchronize()
            with torch.cuda.stream(side), consumer:
                torch.cuda._sleep(delay)
                x.copy_(good)
                planned(x, logits, out=out)
                assert delay == 1 or not side.query(), "the call waited for the device"
            consumer.synchronize()
            assert_same_bits(out, want)

    def test_capture(self, rng, torch):
        """Tensors go into a planned call that is being captured."""
        import cupy

        layer = draw(rng, "bf16")
        planned = MoELayer(to_backend(layer.weights, "cupy"), ROUTING, max_num_tokens=21)
        x, logits = self.tensor(torch, layer.x), self.tensor(torch, layer.logits)
        out = torch.zeros_like(x)
        torch.cuda.synchronize()
        with cupy.cuda.Stream(non_blocking=True) as stream:
            planned(x, logits, out=out)
            stream.synchronize()
            stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeThreadLocal)
            planned(x, logits, out=out)
            graph = stream.end_capture()
            out.zero_()
            torch.cuda.synchronize()
            graph.launch()
            stream.synchronize()
        assert_same_bits(out.view(torch.int16).cpu().numpy().view(BF16), to_host(native(layer)))


class TestJax:
    @pytest.fixture
    def gpu(self) -> Any:
        """Return a function that puts a NumPy array on JAX's GPU."""
        jax = pytest.importorskip("jax")
        try:
            device = jax.devices("gpu")[0]
        except RuntimeError as error:
            pytest.skip(f"this JAX sees no GPU: {error}")
        return lambda x: jax.device_put(x, device)

    @each_recipe
    def test_layer(self, rng, gpu, recipe):
        """bfloat16 and float32 arrays, fp8 weights; the result goes back by DLPack."""
        from jax.dlpack import from_dlpack

        layer = draw(rng, recipe)
        weights = ExpertWeights(
            *(gpu(a) for a in arrays_of(layer.weights)), gate_up_order="gate_up"
        )
        y = cumoe.moe(gpu(layer.x), gpu(layer.logits), weights, routing=ROUTING)
        assert_same_bits(y, native(layer))
        back = from_dlpack(y)
        assert back.dtype == BF16
        assert_same_bits(np.asarray(back), to_host(y))

    def test_quantized(self, rng, gpu):
        layer = draw(rng, "fp8_block")
        q = cumoe.quantize_fp8_block(layer.x)
        weights = to_backend(layer.weights, "cupy")
        for values in (q.values, q.values.view(np.uint8)):
            x = Quantized(gpu(values), gpu(q.scale))
            y = cumoe.moe(x, gpu(layer.logits), weights, routing=ROUTING)
            assert_same_bits(y, native(layer))

    def test_immutable_out_is_refused(self, rng, gpu):
        layer = draw(rng, "bf16")
        weights = to_backend(layer.weights, "cupy")
        with pytest.raises(ValueError, match="out: expected a writable array, got an immutable"):
            cumoe.moe(gpu(layer.x), gpu(layer.logits), weights, routing=ROUTING, out=gpu(layer.x))

    def test_producer_is_waited_for(self, rng, gpu):
        """The input is the result of a long computation that JAX has only queued."""
        import jax

        layer = draw(rng, "bf16")
        weights = to_backend(layer.weights, "cupy")
        x, big = gpu(layer.x), gpu(np.eye(4096, dtype=np.float32))

        @jax.jit
        def slowly(x: Any, big: Any) -> Any:
            for _ in range(30):
                big = big @ big
            return (x.astype("float32") * big[0, 0]).astype(x.dtype)

        slowly(x, big).block_until_ready()
        logits = gpu(layer.logits)
        y = cumoe.moe(slowly(x, big), logits, weights, routing=ROUTING)
        assert_same_bits(y, native(layer))


class TestCudaArrayInterface:
    def test_alone(self, rng):
        """An object with nothing but the interface, its stream included."""
        import cupy

        class Interface:
            def __init__(self, x: Any, stream: Any) -> None:
                self._x = x
                self.dtype = x.dtype
                self.__cuda_array_interface__ = x.__cuda_array_interface__ | {"stream": stream.ptr}

        layer = draw(rng, "fp8_block")
        layer.x = layer.x.astype(np.float32)
        weights = to_backend(layer.weights, "cupy")
        with cupy.cuda.Stream(non_blocking=True) as stream:
            x, logits = (to_backend(a, "cupy") for a in (layer.x, layer.logits))
            given = Interface(x, stream), Interface(logits, stream)
        y = cumoe.moe(*given, weights, routing=ROUTING)
        assert_same_bits(y, native(layer))
