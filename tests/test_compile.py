"""Kernel specs, NVRTC with its errors and resource reports, warm-up, and life without a driver.

The cache has tests of its own. The kernels are ``tests/cu/launch_*.cu``.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cumoe.launch import (
    ARCHS,
    CompileError,
    CubinCache,
    KernelSpec,
    arch_name,
    compile_cubin,
    smem_limit,
    warmup,
)
from cumoe.launch.compile import parse_resources

REPO = Path(__file__).resolve().parents[1]
CU = REPO / "tests" / "cu"
ALL_ARCHS = ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
HOPPER_AND_LATER = ["sm_90a", "sm_100a", "sm_120a"]

AXPY = KernelSpec("launch_axpy", (("PROGRAMMATIC", 0), ("PARAMS_BYTES", 24)), source_dir=CU)
AXPY_PROGRAMMATIC = KernelSpec(
    "launch_axpy", (("PROGRAMMATIC", 1), ("PARAMS_BYTES", 24)), source_dir=CU
)
CLUSTER = KernelSpec("launch_cluster", source_dir=CU)
SMEM = KernelSpec("launch_smem", source_dir=CU)
TMA = KernelSpec("launch_tma", (("BOX_ROWS", 64), ("BOX_COLUMNS", 128)), source_dir=CU)


def write_kernel(folder: Path, body: str, name: str = "probe") -> KernelSpec:
    (folder / f"{name}.cu").write_text(body)
    return KernelSpec(name, source_dir=folder)


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(REPO), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return CubinCache(tmp_path_factory.mktemp("cache"))


class TestImportAndDevice:
    def test_import_loads_no_cuda(self):
        loaded = run_python("import sys, cumoe.launch; print(*sys.modules)").split()
        assert not [m for m in loaded if re.match(r"(cupy|cuda\.|torch|filelock)", m)]

    @pytest.mark.skipif(
        os.path.exists("/proc/driver/nvidia"), reason="this machine has an NVIDIA driver"
    )
    def test_without_a_driver(self, tmp_path):
        """The probes answer, compiling works, and loading says what is missing; nothing hangs."""
        code = f"""
import pathlib
from cumoe.launch import *
print(is_available(), why_unavailable())
spec = KernelSpec("launch_smem", source_dir=pathlib.Path({str(CU)!r}))
print(len(compile_cubin(spec, "sm_90a").cubin) > 1000)
for call in (lambda: get_kernel(spec), current_device, lambda: raw_module("launch_smem"),
             lambda: encode_tiled(1 << 20, "uint8", (64, 128), (128, 1), (64, 128))):
    try:
        call()
    except LaunchError as error:
        print(error)
"""
        lines = run_python(code, CUMOE_CACHE_DIR=str(tmp_path)).splitlines()
        assert lines[0].startswith("False there is no NVIDIA driver") and lines[1] == "True"
        assert len(lines) == 6 and all("NVIDIA driver" in line for line in lines[2:])

    def test_arch_names(self):
        capabilities = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
        names = [arch_name(*capability) for capability in capabilities]
        assert names == ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"]

    def test_smem_limit(self):
        limits = {arch: smem_limit(arch) for arch in ALL_ARCHS}
        assert limits == dict(zip(ALL_ARCHS, (166912, 101376, 232448, 232448, 101376), strict=True))
        assert set(ALL_ARCHS) <= set(ARCHS)
        with pytest.raises(ValueError, match="arch: expected one of sm_80, .*, got 'sm_90'"):
            smem_limit("sm_90")


class TestSpec:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "../x"}, "name: expected a C identifier"),
            ({"name": "k", "defines": (("A", 1), ("A", "1"))}, "defines: expected each macro once"),
            ({"name": "k", "defines": (("A B", 1),)}, "defines: expected an identifier"),
            ({"name": "k", "defines": (("A", "1\n2"),)}, "defines: .* one line"),
            ({"name": "k", "extra_options": ("-I/usr/include",)}, "extra_options: expected flags"),
            ({"name": "k", "extra_options": ("--pre-include=x",)}, "extra_options: expected flags"),
            ({"name": "k", "extra_options": ("/usr/include",)}, "extra_options: expected flags"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            KernelSpec(**arguments)

    def test_options(self):
        spec = KernelSpec("k", (("B", "x y"), ("A", True)), fmad=False, max_registers=64)
        options = spec.options("sm_90a")
        assert {"--gpu-architecture=sm_90a", "--std=c++17", "--generate-line-info"} <= set(options)
        assert {"--ftz=false", "--prec-div=true", "--prec-sqrt=true"} <= set(options)
        assert {"--fmad=false", "--maxrregcount=64", "-DA=1", "-DB=x y"} <= set(options)

    @pytest.mark.parametrize("arch", ["compute_90a", "sm_90b", "90", "sm_90a "])
    def test_bad_arch(self, arch):
        with pytest.raises(ValueError, match="arch: expected a real architecture"):
            compile_cubin(SMEM, arch)

    @pytest.mark.parametrize(
        "include", ['"../above.cuh"', '"/etc/hostname"', '"in.h"', "<in.h>", "MACRO", "<../in.h>"]
    )
    def test_include_that_cannot_be_keyed(self, tmp_path, cache, include):
        (tmp_path / "in.h").touch()
        spec = write_kernel(
            tmp_path, f'extern "C" __global__ void probe() {{}}\n #include {include}\n'
        )
        with pytest.raises(ValueError, match="expected #include of a"):
            compile_cubin(spec, "sm_80", cache=cache)

    def test_include_found_nowhere_is_for_the_compiler(self, tmp_path, cache):
        body = '#ifdef HOST\n#include <cstdint>\n#endif\nextern "C" __global__ void probe() {}\n'
        assert compile_cubin(write_kernel(tmp_path, body), "sm_80", cache=cache).cubin
        spec = write_kernel(tmp_path, "#define HOST\n" + body, "other")
        with pytest.raises(CompileError, match="cstdint"):
            compile_cubin(spec, "sm_80", cache=cache)

    def test_missing_file(self):
        with pytest.raises(FileNotFoundError, match=r"absent\.cu"):
            compile_cubin(KernelSpec("absent"), "sm_80")


class TestCompile:
    @pytest.mark.parametrize("arch", ALL_ARCHS)
    @pytest.mark.parametrize("spec", [AXPY, SMEM], ids=lambda s: s.name)
    def test_everywhere(self, cache, spec, arch):
        kernel = compile_cubin(spec, arch, cache=cache)
        assert kernel.cubin.startswith(b"\x7fELF") and kernel.resources.spill_store_bytes == 0

    @pytest.mark.parametrize("arch", HOPPER_AND_LATER)
    @pytest.mark.parametrize("spec", [AXPY_PROGRAMMATIC, CLUSTER, TMA], ids=lambda s: s.name)
    def test_hopper_and_later(self, cache, spec, arch):
        assert compile_cubin(spec, arch, cache=cache).resources.registers > 0

    def test_resources(self, tmp_path, cache):
        body = """
__device__ __noinline__ int pick(const int* p, int i) {
  volatile int a[40];
  a[i] = p[i];
  return a[p[0]];
}
extern "C" __global__ void other(int* p) { *p = 1; }
extern "C" __global__ void __launch_bounds__(64) probe(int* p) {
  __shared__ int s[10];
  s[threadIdx.x % 10] = p[threadIdx.x];
  __syncthreads();
  *p = pick(p, threadIdx.x) + s[p[3] % 10];
}
"""
        spec = write_kernel(tmp_path, body)
        first = compile_cubin(spec, "sm_90a", cache=cache)
        again = compile_cubin(spec, "sm_90a", cache=CubinCache(cache.directory))
        assert first.resources == again.resources
        assert first.resources.static_smem_bytes == 40 and first.resources.stack_bytes >= 160
        assert 8 <= first.resources.registers <= 64

    def test_spills(self):
        log = (
            "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n"
            "ptxas info    : Function properties for a\n"
            "ptxas         .     64 bytes stack frame, 24 bytes spill stores, 20 bytes "
            "spill loads\n"
            "ptxas info    : Used 168 registers, used 2 barriers, 96 bytes cumulative stack size,"
            " 1028 bytes smem, 400 bytes cmem[0]\n"
            "ptxas info    : Function properties for callee\n"
            "ptxas         .     32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
            "ptxas info    : Compiling entry function 'ab' for 'sm_90a'\n"
            "ptxas         .     0 bytes stack frame, 9 bytes spill stores, 9 bytes spill loads\n"
            "ptxas info    : Used 8 registers\n"
        )
        a = parse_resources(log, "a")
        assert (a.registers, a.spill_store_bytes, a.spill_load_bytes) == (168, 28, 28)
        assert (a.stack_bytes, a.static_smem_bytes) == (96, 1028)
        assert parse_resources(log, "ab").static_smem_bytes == 0
        with pytest.raises(ValueError, match="report on entry 'b'"):
            parse_resources(log, "b")

    def test_error_carries_path_options_and_log(self, cache):
        with pytest.raises(CompileError) as caught:
            compile_cubin(TMA, "sm_80", cache=cache)
        error = caught.value
        assert error.path == str(CU / "launch_tma.cu")
        assert "--gpu-architecture=sm_80" in error.options and f"-I{CU}" in error.options
        assert re.search(r"launch_tma\.cu\(\d+\): .*the copy engine needs sm_90", error.log)
        for part in (error.path, *error.options, error.log):
            assert part in str(error)
        copy = pickle.loads(pickle.dumps(error))
        assert (copy.path, copy.options, copy.log) == (error.path, error.options, error.log)

    def test_error_in_ptxas(self, tmp_path, cache):
        body = 'extern "C" __global__ void probe() { asm volatile("wgmma.fence.sync.aligned;"); }'
        with pytest.raises(CompileError, match=r"wgmma\.fence"):
            compile_cubin(write_kernel(tmp_path, body), "sm_90", cache=cache)

    def test_entry_of_another_name(self, tmp_path, cache):
        spec = write_kernel(tmp_path, 'extern "C" __global__ void wrong() {}')
        with pytest.raises(CompileError, match='no extern "C" __global__ probe'):
            compile_cubin(spec, "sm_90a", cache=cache)

    def test_max_registers_and_fmad(self, tmp_path, cache):
        body = 'extern "C" __global__ void probe(float* p) { p[0] = p[1] * p[2] + p[3]; }'
        write_kernel(tmp_path, body)
        kernels = [
            compile_cubin(
                KernelSpec("probe", fmad=fmad, source_dir=tmp_path), "sm_90a", cache=cache
            )
            for fmad in (True, False)
        ]
        assert kernels[0].cubin != kernels[1].cubin

    def test_warmup_in_processes(self, tmp_path):
        cache = CubinCache(tmp_path / "c")
        specs, calls = [AXPY, SMEM], []
        kernels = warmup(
            specs, ["sm_80", "sm_90a"], lambda *c: calls.append(c), processes=2, cache=cache
        )
        assert len(cache.entries()) == 4 and {call[0] for call in calls} == {1, 2, 3, 4}
        assert {call[2:] for call in calls} == set(kernels)
        assert kernels[SMEM, "sm_80"] == compile_cubin(SMEM, "sm_80", cache=cache)
        with pytest.raises(CompileError, match="the copy engine needs sm_90"):
            warmup([TMA], ["sm_80", "sm_90a", "sm_89"], processes=2, cache=cache)
        assert len(cache.entries()) == 5
