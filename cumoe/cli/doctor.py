"""`python -m cumoe doctor`: what is installed and found, and which backend is on or off and why.

Looks without touching: packages are read from their metadata and not imported, except CuPy and the
CUDA bindings once a driver is there; no context is made on any GPU. Every probe that fails says so
in its place, and none can end the report.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cumoe import launch
from cumoe.cli.console import facts, make_console, quantity
from cumoe.launch.errors import check, require

MIN_COMPUTE_CAPABILITY = (8, 0)

_CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_PACKAGES = {
    "base": ("numpy", "ml_dtypes", "rich", "filelock"),
    "cuda": (*_CUPY, "cuda-core", "cuda-bindings", "cuda-pathfinder"),
    "communication": ("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nccl4py", "mpi4py"),
    "partners": ("torch", "jax"),
}
_INSTALL = "pip install 'cumoe[cu12]' (driver 525 or later) or 'cumoe[cu13]' (driver 580 or later)"


@dataclass(frozen=True)
class Backend:
    """A backend: whether it can be used here, the reason, and what would turn it on."""

    name: str
    on: bool
    reason: str
    turn_on: str | None = None


def run(args: argparse.Namespace) -> int:
    """Print the report; always succeeds."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, make_console())
    return 0


def examine() -> dict[str, Any]:
    """Return everything that is found, as JSON values; a probe that fails leaves its reason."""
    packages = {group: _versions(names) for group, names in _PACKAGES.items()}
    report: dict[str, Any] = {
        "cumoe": _probe(_cumoe_version),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": packages,
        "nvrtc": _probe(_nvrtc),
        "driver": _probe(_driver),
        "gpus": _probe(_gpus),
        "peers": _probe(_peers),
        "nccl": _probe(_nccl),
        "mpirun": shutil.which("mpirun"),
        "cache": _probe(_cache),
    }
    report["backends"] = [asdict(backend) for backend in _backends(report)]
    return report


def _probe(look: Callable[[], Any]) -> Any:
    """Return what `look` finds, or why it cannot be found."""
    try:
        return look()
    except launch.LaunchError as error:
        return {"error": str(error)}
    except Exception as error:  # a report must survive whatever a broken installation raises
        return {"error": f"{type(error).__name__}: {error}"}


def _error(found: Any) -> str | None:
    return found.get("error") if isinstance(found, dict) else None


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Return the installed versions by distribution name, without importing anything."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cumoe_version() -> str:
    from cumoe import __version__

    return f"{__version__} ({Path(launch.KERNEL_DIR).parent})"


def _nvrtc() -> dict[str, Any]:
    """Return version and path of the NVRTC that compiles the kernels; needs no driver."""
    nvrtc = require("cuda.bindings.nvrtc")
    status, major, minor = nvrtc.nvrtcVersion()
    if int(status):
        raise launch.LaunchError(f"nvrtcVersion gives {status}")
    library = require("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc")
    return {"version": f"{major}.{minor}", "path": library.abs_path}


def _driver() -> dict[str, Any]:
    """Return the driver's version and the newest CUDA it runs, by ctypes alone."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"error": "libcuda.so.1 is not found"}
    number = ctypes.c_int(0)
    status = int(libcuda.cuDriverGetVersion(ctypes.byref(number)))
    cuda = None if status else f"{number.value // 1000}.{number.value % 1000 // 10}"
    return {"version": _driver_version(), "cuda": cuda}


def _driver_version() -> str | None:
    """Read the kernel module's version, or that in the name of the library."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"NVRM.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    except OSError:
        found = None
    if found is None:
        try:
            maps = Path("/proc/self/maps").read_text()
        except OSError:
            return None
        found = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)", maps)
    return found[1] if found else None


def _gpus() -> list[dict[str, Any]]:
    """Return the GPUs, none if no kernel could be launched on one."""
    if not launch.is_available():
        return []
    count = int(require("cupy").cuda.runtime.getDeviceCount())
    return [asdict(launch.get_device(ordinal)) for ordinal in range(count)]


def _peers() -> list[list[int]]:
    """Return the pairs of GPUs of which the first cannot access the second's memory."""
    if not launch.is_available():
        return []
    driver = require("cuda.bindings.driver")
    count = int(require("cupy").cuda.runtime.getDeviceCount())
    devices = [check(driver.cuDeviceGet(ordinal), "cuDeviceGet") for ordinal in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    return [
        [i, j]
        for i, j in pairs
        if not check(driver.cuDeviceCanAccessPeer(devices[i], devices[j]), "cuDeviceCanAccessPeer")
    ]


def _nccl() -> str | None:
    """Return the version of the NCCL that CuPy loads."""
    if not launch.is_available():
        return None
    from cumoe.comm.nccl import load

    version = int(load().get_version())
    return f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def _cache() -> dict[str, Any]:
    """Return place, contents and writability of the kernel cache; makes no directory."""
    cache = launch.default_cache()
    directory = cache.directory
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    if writable and place == directory:
        try:
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError:
            writable = False
    return {
        "directory": str(directory),
        "kernels": len(cache.entries()),
        "bytes": cache.size_bytes(),
        "writable": writable,
    }


def _backends(report: dict[str, Any]) -> list[Backend]:
    """Judge each backend by what was found."""
    return [
        Backend("NumPy", True, "the reference; runs wherever Python does"),
        _compiler(report),
        _cuda(report),
        _multi_gpu(report),
    ]


def _compiler(report: dict[str, Any]) -> Backend:
    """Judge whether kernels can be compiled, which needs no GPU."""
    name, error = "kernel compiler", _error(report["nvrtc"])
    if error is not None:
        return Backend(name, False, f"NVRTC cannot be used: {error}", _INSTALL)
    reason = f"NVRTC {report['nvrtc']['version']}; `python -m cumoe warmup` works"
    if _error(report["cache"]) is None and not report["cache"]["writable"]:
        hint = "set CUMOE_CACHE_DIR to a directory that can be written"
        return Backend(name, True, f"{reason}, but nothing is kept: the cache is read-only", hint)
    return Backend(name, True, reason)


def _cuda(report: dict[str, Any]) -> Backend:
    """Judge whether layers can run on a GPU."""
    name = "CUDA"
    cupy = [n for n in _CUPY if report["packages"]["cuda"][n] is not None]
    if len(cupy) > 1:
        reason = f"{' and '.join(cupy)} are installed and exclude each other"
        return Backend(name, False, reason, f"pip uninstall {' '.join(cupy)}, then {_INSTALL}")
    reason = _probe(launch.why_unavailable)
    if reason is not None:
        return Backend(name, False, _error(reason) or reason, _remedy(report, bool(cupy)))
    if _error(report["gpus"]) is not None:
        return Backend(name, False, str(_error(report["gpus"])), "check that nvidia-smi works")
    if _error(report["nvrtc"]) is not None:
        return Backend(name, False, "kernels cannot be compiled", _INSTALL)
    able = [g for g in report["gpus"] if tuple(g["compute_capability"]) >= MIN_COMPUTE_CAPABILITY]
    if not able:
        return Backend(name, False, "no GPU of compute capability 8.0 or later", "a newer GPU")
    return Backend(name, True, f"{len(able)} of {len(report['gpus'])} GPUs can run the kernels")


def _remedy(report: dict[str, Any], has_cupy: bool) -> str:
    """Say what would turn the CUDA backend on."""
    if not has_cupy or report["packages"]["cuda"]["cuda-bindings"] is None:
        return _INSTALL
    if _error(report["driver"]) is not None:
        return "an NVIDIA GPU and its driver (in a container: pass the GPUs through)"
    return "check that nvidia-smi works and CUDA_VISIBLE_DEVICES hides no GPU"


def _multi_gpu(report: dict[str, Any]) -> Backend:
    """Judge whether the GPUs here can share memory, and say how ranks would find each other."""
    name = "multi-GPU"
    count = 0 if _error(report["gpus"]) is not None else len(report["gpus"])
    if count < 2:
        hint = "`python -m cumoe demo --ranks 2 --backend numpy` runs ranks without GPUs"
        return Backend(name, False, f"two or more GPUs are needed ({count} found)", hint)
    if _error(report["peers"]) is not None:
        return Backend(name, False, f"peer access is not known: {_error(report['peers'])}")
    if report["peers"]:
        first, second = report["peers"][0]
        reason = f"GPU {first} cannot access the memory of GPU {second}"
        hint = "`nvidia-smi topo -p2p rw` shows which can; CUDA_VISIBLE_DEVICES chooses those"
        return Backend(name, False, reason, hint)
    ways = "TCP, threads"
    if report["packages"]["communication"]["mpi4py"] is not None and report["mpirun"]:
        ways = f"MPI, {ways}"
    return Backend(name, True, f"{count} GPUs share memory; ranks meet by {ways}")


def _print(report: dict[str, Any], console: Console) -> None:
    """Print the report in sections."""
    console.print(Text("Backends", "bold"))
    table = Table.grid(padding=(0, 2))
    for backend in report["backends"]:
        state = Text("on", "bold green") if backend["on"] else Text("off", "bold red")
        table.add_row(backend["name"], state, Text(backend["reason"]))
        if backend["turn_on"]:
            table.add_row("", "", Text(f"-> {backend['turn_on']}", "dim"))
    console.print(table)
    console.print(Text("\nMachine", "bold"))
    table = facts()
    table.add_row("platform", report["platform"])
    table.add_row("driver", _driver_text(report["driver"]))
    for line in _gpu_lines(report["gpus"]):
        table.add_row("GPU", line)
    table.add_row("NVRTC", _nvrtc_text(report["nvrtc"]))
    table.add_row("cache", _cache_text(report["cache"]))
    table.add_row("peers", _peers_text(report))
    table.add_row("NCCL", _error(report["nccl"]) or report["nccl"] or "not loaded without a GPU")
    table.add_row("MPI", _mpi_text(report))
    console.print(table)
    console.print(Text("\nSoftware", "bold"))
    table = facts()
    table.add_row("cumoe", _error(report["cumoe"]) or report["cumoe"])
    table.add_row("python", report["python"])
    for group, versions in report["packages"].items():
        here = [f"{name} {version}" for name, version in versions.items() if version]
        missing = [name for name, version in versions.items() if not version]
        text = Text(", ".join(here) or "none")
        if missing:
            text.append(f"\nnot installed: {', '.join(missing)}", "dim")
        table.add_row(group, text)
    console.print(table)


def describe_driver() -> str:
    """Return the driver's version and the newest CUDA it runs, in words."""
    return _driver_text(_probe(_driver))


def _driver_text(driver: dict[str, Any]) -> str:
    if _error(driver) is not None:
        return f"none: {driver['error']}"
    cuda = f"CUDA {driver['cuda']}" if driver["cuda"] else "CUDA version unknown"
    return f"{driver['version'] or 'version unknown'}, runs up to {cuda}"


def _gpu_lines(gpus: Any) -> list[str]:
    if _error(gpus) is not None:
        return [str(_error(gpus))]
    return [
        f"{g['ordinal']}: {g['name']}, compute capability "
        f"{'.'.join(map(str, g['compute_capability']))} ({g['arch']}), {g['num_sms']} SMs, "
        f"{quantity(g['total_memory_bytes'], 'B')}"
        for g in gpus
    ] or ["none"]


def _peers_text(report: dict[str, Any]) -> str:
    """Describe which GPUs can access each other's memory."""
    peers = report["peers"]
    if _error(peers) is not None:
        return str(_error(peers))
    if not isinstance(report["gpus"], list) or len(report["gpus"]) < 2:
        return "needs two or more GPUs"
    if not peers:
        return "every GPU can access the memory of every other"
    return "no access from GPU " + ", ".join(f"{i} to {j}" for i, j in peers)


def _mpi_text(report: dict[str, Any]) -> str:
    """Name the launcher and the Python package of MPI."""
    version = report["packages"]["communication"]["mpi4py"]
    package = f"mpi4py {version}" if version else "mpi4py is not installed (extra mpi)"
    return f"{report['mpirun'] or 'mpirun is not found'}; {package}"


def _nvrtc_text(nvrtc: dict[str, Any]) -> str:
    if _error(nvrtc) is not None:
        return f"none: {nvrtc['error']}"
    return f"{nvrtc['version']} ({nvrtc['path']})"


def _cache_text(cache: dict[str, Any]) -> str:
    if _error(cache) is not None:
        return str(cache["error"])
    state = "writable" if cache["writable"] else "NOT writable"
    size = quantity(cache["bytes"], "B")
    return f"{cache['directory']} ({cache['kernels']} kernels, {size}, {state})"
