"""Launch shapes, parameter structs, loading and launching.

Without a GPU the driver is replaced by :class:`FakeDriver`, which reads the very memory that a real
launch would read. The tests marked ``gpu`` run the kernels ``tests/cu/launch_*.cu``.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cumoe.launch import (
    ARCHS,
    TENSOR_MAP,
    CompileError,
    CubinCache,
    Device,
    KernelSpec,
    LaunchConfig,
    LaunchError,
    PreparedLaunch,
    compile_cubin,
    current_device,
    get_kernel,
    launch,
    params_dtype,
    raw_module,
    smem_limit,
)
from cumoe.launch.errors import check

launch_module = importlib.import_module("cumoe.launch.launch")
module_module = importlib.import_module("cumoe.launch.module")

REPO = Path(__file__).resolve().parents[1]
CU = REPO / "tests" / "cu"
AXPY_PARAMS = params_dtype([("y", "u8"), ("x", "u8"), ("a", "f4"), ("n", "i4")])
SMEM_PARAMS = params_dtype([("out", "u8"), ("in", "u8"), ("n", "i4")])
CLUSTER_PARAMS = params_dtype([("out", "u8")])


def axpy_spec(programmatic: bool = False) -> KernelSpec:
    defines = (("PROGRAMMATIC", programmatic), ("PARAMS_BYTES", AXPY_PARAMS.itemsize))
    return KernelSpec("launch_axpy", defines, source_dir=CU)


CLUSTER_SPEC = KernelSpec("launch_cluster", source_dir=CU)
SMEM_SPEC = KernelSpec("launch_smem", source_dir=CU)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return CubinCache(tmp_path_factory.mktemp("cache"))


class TestLaunchConfig:
    def test_sizes_are_completed(self):
        config = LaunchConfig((4,), (128, 2), cluster=(2,))
        assert (config.grid, config.block, config.cluster) == ((4, 1, 1), (128, 2, 1), (2, 1, 1))
        assert hash(config) == hash(LaunchConfig((4, 1, 1), (128, 2, 1), (2, 1, 1)))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((0,), (32,)), "grid: expected sizes from 1"),
            (((1, 65536), (32,)), "grid: expected sizes from 1"),
            (((1,), ()), "block: expected one to three sizes"),
            (((1,), (64, 32)), "block: expected at most 1024 threads"),
            (((6,), (32,), (4,)), "cluster: expected a divisor of grid"),
            (((32, 32), (32,), (8, 4)), "cluster: expected at most 16 blocks"),
            (((1,), (32,), None, -1), "smem_bytes: expected at least 0"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LaunchConfig(*arguments)


class TestParamsDtype:
    INNER = params_dtype([("tag", "i1"), ("value", "f8")])
    PARAMS = params_dtype(
        [
            ("first", "i1"),
            ("map", TENSOR_MAP),
            ("pair", "i2", (3,)),
            ("inner", INNER),
            ("last", "i4"),
        ]
    )

    def test_layout_is_that_of_the_compiler(self, cache):
        fields = ("map", "pair", "inner", "last")
        offsets: dict[str, Any] = dict(self.PARAMS.fields or {})
        defines = tuple((f"OFFSET_{name.upper()}", offsets[name][1]) for name in fields)
        defines += (("PARAMS_BYTES", self.PARAMS.itemsize),)
        compile_cubin(KernelSpec("launch_layout", defines, source_dir=CU), "sm_80", cache=cache)
        wrong = tuple((name, int(value) + 4 * (name == "OFFSET_LAST")) for name, value in defines)
        with pytest.raises(CompileError, match="offset_differs_from_the_host"):
            compile_cubin(KernelSpec("launch_layout", wrong, source_dir=CU), "sm_80", cache=cache)

    def test_fields_can_be_set(self):
        params = np.zeros((), self.PARAMS)
        params["map"] = np.arange(16)
        params["pair"] = (1, 2, 3)
        params["inner"]["value"] = 0.5
        assert params["map"].tolist() == list(range(16)) and params["inner"]["value"] == 0.5

    def test_plain_structs_agree_with_numpy(self):
        fields = [("a", "i1"), ("b", "i8"), ("c", "i2"), ("d", "f4"), ("e", "u1")]
        assert params_dtype(fields) == np.dtype(fields, align=True)


class FakeDriver:
    """Stands in for the driver's calls and keeps what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, params_bytes: int) -> None:
        self.driver = importlib.import_module("cuda.bindings.driver")
        self.params_bytes = params_bytes
        self.attributes: list[tuple[str, int, int]] = []
        self.launches: list[SimpleNamespace] = []
        self.statuses: list[str] = []
        ok = self.driver.CUresult.CUDA_SUCCESS
        calls = {
            "cuInit": lambda flags: (ok,),
            "cuLibraryLoadData": lambda cubin, *rest: (ok, self.driver.CUlibrary(0x11)),
            "cuLibraryGetKernel": lambda library, name: (ok, self.driver.CUkernel(0x22)),
            "cuKernelGetParamInfo": self.param_info,
            "cuKernelSetAttribute": self.set_attribute,
            "cuLaunchKernelEx": self.launch,
        }
        for name, call in calls.items():
            monkeypatch.setattr(self.driver, name, call)
        self.device = Device(0, "fake", (9, 0), "sm_90a", 132, 232448, 50 << 20, 80 << 30)
        for module in (module_module, launch_module):
            monkeypatch.setattr(module, "current_device", lambda: self.device)
        monkeypatch.setattr(launch_module, "current_ordinal", lambda: self.device.ordinal)
        monkeypatch.setattr(module_module, "_kernels", {})

    def param_info(self, kernel, index):
        if index:
            return (self.driver.CUresult.CUDA_ERROR_INVALID_VALUE, None, None)
        return (self.driver.CUresult.CUDA_SUCCESS, 0, self.params_bytes)

    def set_attribute(self, attribute, value, kernel, device):
        self.attributes.append((attribute.name, value, int(device)))
        return (self.driver.CUresult.CUDA_SUCCESS,)

    def launch(self, config, function, params, extra):
        status = self.statuses.pop(0) if self.statuses else "CUDA_SUCCESS"
        (address,) = (ctypes.c_uint64 * 1).from_address(params)
        grid = np.frombuffer(ctypes.string_at(config.getPtr(), 28), np.uint32).tolist()
        attributes = {a.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_"): a.value for a in config.attrs}
        self.launches.append(
            SimpleNamespace(
                shape=grid,
                stream=int(config.hStream),
                function=int(function),
                params=ctypes.string_at(address, self.params_bytes),
                attributes=attributes,
                num_attributes=config.numAttrs,
                config=config,
            )
        )
        return (getattr(self.driver.CUresult, status),)


@pytest.fixture
def fake(monkeypatch, cache):
    monkeypatch.setenv("CUMOE_CACHE_DIR", str(cache.directory))
    return FakeDriver(monkeypatch, AXPY_PARAMS.itemsize)


def axpy_params(**values: float) -> np.ndarray:
    params = np.zeros((), AXPY_PARAMS)
    for name, value in values.items():
        params[name] = value
    return params


class TestLaunchWithoutGpu:
    def test_kernel_is_loaded_once(self, fake):
        kernel = get_kernel(axpy_spec())
        assert get_kernel(axpy_spec()) is kernel and get_kernel(axpy_spec(), fake.device) is kernel
        assert (kernel.arch, kernel.params_bytes) == ("sm_90a", 24)
        assert int(kernel.handle) == int(kernel.function) == 0x22

    def test_drivers_that_do_not_tell_the_size(self, fake, monkeypatch):
        def missing(handle, index):
            raise RuntimeError('Function "cuKernelGetParamInfo" is not found')

        monkeypatch.setattr(fake.driver, "cuKernelGetParamInfo", missing)
        kernel = get_kernel(axpy_spec())
        assert kernel.params_bytes is None
        launch(kernel, LaunchConfig((1,), (32,)), axpy_params(), 0)

    @pytest.mark.parametrize("statuses", [("SUCCESS", "SUCCESS"), ("ERROR_INVALID_VALUE",) * 2])
    def test_kernels_take_one_struct(self, fake, monkeypatch, statuses):
        def info(handle, index):
            return (getattr(fake.driver.CUresult, f"CUDA_{statuses[index]}"), 0, 8)

        monkeypatch.setattr(fake.driver, "cuKernelGetParamInfo", info)
        with pytest.raises(LaunchError, match="expected a kernel with one parameter"):
            get_kernel(axpy_spec())

    def test_params_and_shape_reach_the_driver(self, fake):
        kernel = get_kernel(axpy_spec())
        config = LaunchConfig(
            (6, 5, 4), (32, 2), cluster=(2, 1, 2), smem_bytes=7, programmatic=True
        )
        params = axpy_params(y=0x123456789ABC, x=2, a=0.5, n=-3)
        launch(kernel, config, params, 0xBEEF0)
        seen = fake.launches[-1]
        assert seen.shape == [6, 5, 4, 32, 2, 1, 7]
        assert (seen.stream, seen.function, seen.params) == (0xBEEF0, 0x22, params.tobytes())
        cluster = seen.attributes["CLUSTER_DIMENSION"].clusterDim
        assert (cluster.x, cluster.y, cluster.z, seen.num_attributes) == (2, 1, 2, 2)
        serialization = seen.attributes["PROGRAMMATIC_STREAM_SERIALIZATION"]
        assert serialization.programmaticStreamSerializationAllowed == 1

    def test_native_config_is_built_once(self, fake):
        kernel = get_kernel(axpy_spec())
        for grid, stream in ((1, 0), (1, 0), (2, 0), (1, 16)):
            launch(kernel, LaunchConfig((grid,), (32,)), axpy_params().reshape(1), stream)
        configs = [seen.config for seen in fake.launches]
        assert configs[0] is configs[1] and len({id(config) for config in configs}) == 3

    def test_prepared_launch_sees_changed_fields(self, fake):
        params = axpy_params(n=1)
        prepared = PreparedLaunch(get_kernel(axpy_spec()), LaunchConfig((1,), (32,)), params)
        prepared.run(0)
        params["n"] = 2
        prepared.run(0)
        first, second = fake.launches
        assert first.params != second.params == params.tobytes() and first.config is second.config

    @pytest.mark.parametrize(
        ("params", "error", "message"),
        [
            (np.zeros(2, AXPY_PARAMS), ValueError, "got 2 of 24"),
            (np.zeros((), SMEM_PARAMS)[..., None][:0], ValueError, "got 0 of 24"),
            (np.zeros((), CLUSTER_PARAMS), ValueError, "one struct of 24 bytes for launch_axpy"),
            (np.zeros(24, np.uint8), TypeError, "params: expected a structured NumPy array"),
            ((1, 2), TypeError, "got tuple"),
        ],
    )
    def test_bad_params(self, fake, params, error, message):
        with pytest.raises(error, match=message):
            launch(get_kernel(axpy_spec()), LaunchConfig((1,), (32,)), params, 0)

    def test_shared_memory_is_a_high_water_mark(self, fake):
        kernel = get_kernel(SMEM_SPEC)  # 64 bytes static
        for nbytes in (49088, 100_000, 60_000, 100_000, 232384):
            launch(kernel, LaunchConfig((1,), (32,), smem_bytes=nbytes), axpy_params(), 0)
        carveout = ("CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT", 100, 0)
        name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        assert fake.attributes == [carveout, (name, 100_000, 0), (name, 232384, 0)]
        with pytest.raises(ValueError, match="nbytes: expected at most 232384 .* got 232385"):
            launch(kernel, LaunchConfig((1,), (32,), smem_bytes=232385), axpy_params(), 0)

    def test_large_cluster_is_allowed_once(self, fake):
        kernel = get_kernel(axpy_spec())
        for cluster in (8, 16, 16):
            PreparedLaunch(kernel, LaunchConfig((16,), (32,), (cluster,)), axpy_params())
        name = "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED"
        assert fake.attributes == [(name, 1, 0)]

    def test_errors_name_kernel_and_status(self, fake):
        fake.statuses = ["CUDA_ERROR_INVALID_VALUE"]
        with pytest.raises(
            LaunchError, match=r"launch of launch_axpy: CUDA_ERROR_INVALID_VALUE \(1"
        ):
            launch(get_kernel(axpy_spec()), LaunchConfig((1,), (32,)), axpy_params(), 0)

    def test_missing_context_is_made_current(self, fake, monkeypatch):
        chosen: list[int] = []
        cupy = importlib.import_module("cupy")
        monkeypatch.setattr(cupy.cuda.runtime, "setDevice", chosen.append)
        fake.statuses = ["CUDA_ERROR_INVALID_CONTEXT"]
        launch(get_kernel(axpy_spec()), LaunchConfig((1,), (32,)), axpy_params(), 0)
        assert chosen == [0] and len(fake.launches) == 2

    def test_check(self, fake):
        ok = fake.driver.CUresult.CUDA_SUCCESS
        assert check((ok,)) is None and check((ok, 5)) == 5 and check((ok, 1, 2)) == (1, 2)
        with pytest.raises(LaunchError, match=r"^cuInit: CUDA_ERROR_NO_DEVICE \(100\)$"):
            check((fake.driver.CUresult.CUDA_ERROR_NO_DEVICE, None), "cuInit")


@pytest.mark.gpu
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, cache):
        monkeypatch.setenv("CUMOE_CACHE_DIR", str(cache.directory))
        self.cp = importlib.import_module("cupy")
        self.stream = self.cp.cuda.get_current_stream().ptr

    def needs_sm90(self) -> None:
        if current_device().compute_capability < (9, 0):
            pytest.skip("needs compute capability 9.0")

    def axpy(self):
        n = 1000
        y, x = self.cp.arange(n, dtype="f4"), self.cp.ones(n, dtype="f4")
        return y, axpy_params(y=y.data.ptr, x=x.data.ptr, a=2, n=n), x

    def test_device(self):
        device = current_device()
        assert device.arch.startswith("sm_") and device.num_sms > 0 and device.l2_bytes > 0
        if device.arch in ARCHS:
            assert device.max_smem_bytes == smem_limit(device.arch)

    def test_axpy(self):
        y, params, _x = self.axpy()
        kernel = get_kernel(axpy_spec())
        launch(kernel, LaunchConfig((8,), (128,)), params, self.stream)
        np.testing.assert_array_equal(y.get(), np.arange(1000) + 2)

    def test_programmatic_launches_keep_their_order_also_in_a_graph(self):
        self.needs_sm90()
        y, params, _x = self.axpy()
        config = LaunchConfig((8,), (128,), programmatic=True)
        prepared = PreparedLaunch(get_kernel(axpy_spec(programmatic=True)), config, params)
        with self.cp.cuda.Stream(non_blocking=True) as stream:
            self.cp.cuda.Device().synchronize()
            stream.begin_capture()
            for _ in range(20):
                prepared.run(stream.ptr)
            graph = stream.end_capture()
            for _ in range(5):
                graph.launch(stream)
            for _ in range(100):
                prepared.run(stream.ptr)
            stream.synchronize()
        np.testing.assert_array_equal(y.get(), np.arange(1000) + 2 * 200)

    def test_launch_from_a_fresh_thread(self):
        y, params, _x = self.axpy()
        kernel, errors = get_kernel(axpy_spec()), []

        def work():
            try:
                launch(kernel, LaunchConfig((8,), (128,)), params, 0)
            except Exception as error:  # handed to the test's thread
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not errors
        np.testing.assert_array_equal(y.get(), np.arange(1000) + 2)

    def test_raw_module(self):
        y, params, _x = self.axpy()
        kernel = raw_module("launch_axpy", axpy_spec().defines, source_dir=CU).get_function(
            "launch_axpy"
        )
        kernel((8,), (128,), (params,))
        np.testing.assert_array_equal(y.get(), np.arange(1000) + 2)

    @pytest.mark.parametrize("size", [1, 8, 16])
    def test_cluster(self, size):
        self.needs_sm90()
        out = self.cp.full((32, 2), -1, dtype="i4")
        params = np.array((out.data.ptr,), CLUSTER_PARAMS)
        launch(get_kernel(CLUSTER_SPEC), LaunchConfig((32,), (32,), (size,)), params, self.stream)
        expected = [[block % size, size] for block in range(32)]
        assert out.get().tolist() == expected

    def test_shared_memory_up_to_the_limit(self):
        kernel = get_kernel(SMEM_SPEC)
        most = current_device().max_smem_bytes - kernel.resources.static_smem_bytes
        for nbytes in (16 * 1024, 60 * 1024, most, 16 * 1024):
            x = self.cp.arange(nbytes // 4, dtype="i4")
            out = self.cp.zeros_like(x)
            params = np.array((out.data.ptr, x.data.ptr, x.size), SMEM_PARAMS)
            launch(kernel, LaunchConfig((1,), (256,), smem_bytes=nbytes), params, self.stream)
            np.testing.assert_array_equal(out.get(), x.get()[::-1])
