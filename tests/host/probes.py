"""Little kernels of Hopper's machinery, made of a body alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cumoe.kernels import Launch
from cumoe.launch import TENSOR_MAP, KernelSpec, LaunchConfig, params_dtype
from tests.host import loader
from tests.host.memory import Arena

PARAMS = params_dtype([("out", np.uint64), ("n", np.int32), ("map", TENSOR_MAP)])
SEEDS = range(12)
Probe = Callable[..., np.ndarray]


def hopper_probe(folder: Path) -> Probe:
    """Return what runs a body as kernel ``probe`` and returns its int32 array ``out`` of `n`."""

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
        (folder / "probe.cu").write_text(text)
        with Arena() as arena:
            out = arena.array(np.full(n, -7, np.int32))
            params = np.zeros((), PARAMS)
            params["out"], params["n"] = out.ctypes.data, n
            if tensor_map is not None:
                params["map"] = tensor_map
            spec = KernelSpec("probe", source_dir=folder)
            config = LaunchConfig((cluster, 1, 1), (block, 1, 1), (cluster, 1, 1), smem_bytes=smem)
            loader.run([Launch(spec, config, params)], loader.HostOptions(seed=seed))
            return out.copy()

    return run


def some_fail(probe: Probe, body: str, expected: list[int], **options) -> int:
    """Count the seeds whose run fails or gives another result."""
    count = 0
    for seed in SEEDS:
        try:
            count += probe(body, seed=seed, **options).tolist() != expected
        except loader.HostError:
            count += 1
    return count
