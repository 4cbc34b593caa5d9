"""What is kept of a run: the machine it ran on, rows of figures, their JSON file and their table.

Owns the row format that every file under ``bench/results/`` has. Measures nothing and knows no op.
A figure without its GPU, clocks, driver and commit is worth nothing, so the writer adds them.
CuPy is imported on use.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from bench.harness import Timing

Row = dict[str, Any]

REPO = Path(__file__).resolve().parents[1]
KEY = ("op", "model", "recipe", "num_tokens", "num_gpus")
"""Fields that name a row, with ``variant`` where a row has one."""

_TIMES = ("us", "us_min", "us_max")
_RATES = ("tflops", "tbps", "peer_us")
_PACKAGES = ("numpy", "ml_dtypes", "cuda-core", "cuda-bindings", "torch", "triton")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")


@functools.cache
def device_available() -> bool:
    """Whether CuPy is installed and finds a GPU."""
    try:
        import cupy
    except ImportError:
        return False
    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def l2_bytes() -> int:
    """Return the size of the current device's L2."""
    import cupy

    runtime = cupy.cuda.runtime
    attribute = runtime.cudaDevAttrL2CacheSize
    return int(runtime.deviceGetAttribute(attribute, cupy.cuda.Device().id))


def environment() -> dict[str, Any]:
    """Describe the machine, the software and the commit that figures come from.

    Returns
    -------
    dict
        ``gpu``, ``driver``, ``cuda``, ``nvrtc`` and ``clocks`` (MHz, of the busy GPU), all
        None without a GPU; ``commit`` (ends in ``-dirty`` when tracked files differ from it),
        ``command``, ``date`` (UTC), ``python``, ``platform``, ``cpus`` and ``packages``.
    """
    gpu: dict[str, Any] = dict.fromkeys(("gpu", "driver", "cuda", "nvrtc", "clocks"))
    if device_available():
        gpu = _describe_gpu()
    return gpu | {
        "commit": _commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in (*_PACKAGES, *_CUPY):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """``BENCH_COMMIT``, which says what a copied tree is, or else HEAD of this checkout."""
    if stated := os.environ.get("BENCH_COMMIT"):
        return stated
    try:
        head = _output("git", "-C", str(REPO), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(REPO), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head


def _output(*command: str) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout.strip()


def _describe_gpu() -> dict[str, Any]:
    import cupy

    runtime = cupy.cuda.runtime
    device = cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    cuda = runtime.runtimeGetVersion()
    smi = _query_smi(runtime.deviceGetPCIBusId(device.id))
    return {
        "gpu": properties["name"].decode(),
        "driver": smi.pop("driver_version", None),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "nvrtc": ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion()),
        "clocks": smi or None,
    }


def _query_smi(bus_id: str) -> dict[str, Any]:
    """Ask nvidia-smi for the driver, and for the clocks while the GPU works: idle ones mislead."""
    import cupy

    fields = {
        "driver_version": "driver_version",
        "sm_mhz": "clocks.sm",
        "mem_mhz": "clocks.mem",
        "max_sm_mhz": "clocks.max.sm",
        "max_mem_mhz": "clocks.max.mem",
    }
    query = ["nvidia-smi", "-i", bus_id, f"--query-gpu={','.join(fields.values())}"]
    try:
        process = subprocess.Popen(
            [*query, "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return {}
    size = 1 << 28
    buffer, stream = cupy.cuda.alloc(size), cupy.cuda.Stream(non_blocking=True)
    while process.poll() is None:
        for value in range(16):
            buffer.memset_async(value, size, stream)
        stream.synchronize()
    text = process.communicate()[0].strip()
    if process.returncode != 0 or not text:
        return {}
    values = dict(zip(fields, (part.strip() for part in text.split(",")), strict=True))
    return {key: int(value) if value.isdigit() else value for key, value in values.items()}


def make_row(
    op: str,
    *,
    model: str | None,
    recipe: str | None,
    num_tokens: int,
    timing: Timing,
    num_gpus: int = 1,
    flops: float | None = None,
    num_bytes: float | None = None,
    peer: str | None = None,
    peer_us: float | None = None,
    **extra: Any,
) -> Row:
    """Return a checked row of `timing`, with rates for useful `flops` and `num_bytes` moved."""
    row: Row = {
        "op": op,
        "model": model,
        "recipe": recipe,
        "num_tokens": num_tokens,
        "num_gpus": num_gpus,
        "us": timing.us,
        "us_min": timing.us_min,
        "us_max": timing.us_max,
        "tflops": None if flops is None else flops / timing.us * 1e-6,
        "tbps": None if num_bytes is None else num_bytes / timing.us * 1e-6,
        "peer": peer,
        "peer_us": peer_us,
    }
    return check_row(row | extra)


def peer_fields(peers: Mapping[str, Row]) -> Row:
    """Return the fields of a row that keep its peers.

    Parameters
    ----------
    peers : mapping of str to dict
        By name; each has ``us``, and what else is kept of it.

    Returns
    -------
    dict
        ``peer`` and ``peer_us`` of the fastest, None if there is none, and ``peers`` as given.
    """
    best = min(peers, key=lambda name: float(peers[name]["us"]), default=None)
    us = None if best is None else peers[best]["us"]
    return {"peer": best, "peer_us": us, "peers": dict(peers)}


def check_row(row: Mapping[str, Any]) -> Row:
    """Return `row` with absent optional fields as None, or raise naming the field that is wrong.

    Required: ``op``, ``model``, ``recipe``, ``num_tokens``, ``num_gpus``. ``us``, ``us_min`` and
    ``us_max`` come together, or not at all in a row whose figure is no time. ``tflops``, ``tbps``,
    ``peer`` and ``peer_us`` are optional, the last two together, of the fastest where there are
    several (:func:`peer_fields`). Further fields are kept.

    Raises
    ------
    ValueError
        If a field is missing, of the wrong kind, or at odds with another.
    """
    missing = [name for name in KEY if name not in row]
    if missing:
        raise ValueError(f"row: expected the fields {list(KEY)}, got none of {missing}")
    full: Row = {**dict.fromkeys((*_TIMES, "tflops", "tbps", "peer", "peer_us")), **row}
    full = {name: full[name] for name in (*KEY, *(n for n in full if n not in KEY))}
    if not isinstance(full["op"], str) or not full["op"]:
        raise ValueError(f"op: expected a name, got {full['op']!r}")
    for name in ("model", "recipe", "peer"):
        if full[name] is not None and not isinstance(full[name], str):
            raise ValueError(f"{name}: expected a name or None, got {full[name]!r}")
    for name, low in (("num_tokens", 0), ("num_gpus", 1)):
        value = full[name]
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise ValueError(f"{name}: expected an int >= {low}, got {value!r}")
        full[name] = int(value)
    for name in (*_TIMES, *_RATES):
        if full[name] is not None:
            full[name] = _positive(name, full[name])
    times = [full[name] for name in _TIMES]
    if any(t is None for t in times) and any(t is not None for t in times):
        raise ValueError(f"us, us_min, us_max: expected all or none, got {times}")
    if times[0] is not None and not times[1] <= times[0] <= times[2]:
        raise ValueError(f"us: expected a value within [us_min, us_max], got {times}")
    if (full["peer"] is None) != (full["peer_us"] is None):
        raise ValueError(
            f"peer, peer_us: expected both or neither, got {full['peer']!r}, {full['peer_us']!r}"
        )
    return full


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: expected a positive number or None, got {value!r}")
    return float(value)


def _key(row: Row) -> tuple[Any, ...]:
    return (*(row[name] for name in KEY), row.get("variant"))


def write_results(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    merge: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    """Write `rows` with the environment and the seed as JSON, and return what was written.

    Parameters
    ----------
    path : path
        Usually ``bench/results/<name>.json``; folders are made.
    rows : iterable of mapping
        As :func:`check_row` wants them, no two with the same :data:`KEY` and ``variant``.
    seed : int
        Of the inputs.
    merge : bool
        Keep the rows of an existing file that this run did not repeat. Such a row takes along the
        date, commit and command of its own run.
    extra
        Further fields at the top, such as ``copy_tbps``.

    Raises
    ------
    ValueError
        If a row is wrong or there twice, if a figure is not finite, or if `merge` meets a file of
        another GPU, driver or CUDA.
    """
    path = Path(path)
    new = [check_row(row) for row in rows]
    keys = [_key(row) for row in new]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"rows: expected each key once, got {key} {keys.count(key)} times")
    record = environment() | extra | {"seed": seed}
    if merge and path.exists():
        new = _kept_rows(json.loads(path.read_text()), record, set(keys), path) + new
    record["rows"] = new
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(record, indent=1, allow_nan=False, default=lambda scalar: scalar.item())
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
    return record


def _kept_rows(
    old: dict[str, Any], record: dict[str, Any], replaced: set[Any], path: Path
) -> list[Row]:
    for name in ("gpu", "driver", "cuda"):
        if old.get(name) != record[name]:
            raise ValueError(
                f"merge: {path} was measured with {name} {old.get(name)!r}, this run has "
                f"{record[name]!r}: expected the same"
            )
    origin = {name: old.get(name) for name in ("date", "commit", "command")}
    return [origin | row for row in old["rows"] if _key(row) not in replaced]


def print_table(
    rows: Iterable[Mapping[str, Any]],
    *,
    title: str | None = None,
    roof_tbps: float | None = None,
    roof_tflops: float | None = None,
    console: Console | None = None,
) -> None:
    """Print `rows` as a table, with rates as parts of the roofs measured in the same run.

    The cells of peers have a line for each, the fastest first.
    """
    table = Table(title=title)
    for name in ("op", "model", "recipe"):
        table.add_column(name)
    for name in ("tokens", "GPUs", "us", "min .. max", "TFLOP/s", "TB/s", "peer us", "peer / us"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in map(check_row, rows):
        timed = row["us"] is not None
        op = f"{row['op']} ({row['variant']})" if row.get("variant") else row["op"]
        peers = _peer_times(row)
        table.add_row(
            op,
            row["model"] or "",
            row["recipe"] or "",
            str(row["num_tokens"]),
            str(row["num_gpus"]),
            f"{row['us']:.1f}" if timed else "",
            f"{row['us_min']:.1f} .. {row['us_max']:.1f}" if timed else "",
            _rate(row["tflops"], roof_tflops),
            _rate(row["tbps"], roof_tbps),
            "\n".join(f"{us:.1f} ({name})" for name, us in peers),
            "\n".join(f"{us / row['us']:.2f}" for _, us in peers) if timed else "",
        )
    (console or Console()).print(table)


def _peer_times(row: Row) -> list[tuple[str, float]]:
    """Return every peer of a row with its time, the fastest first."""
    if row["peer"] is None:
        return []
    named = row.get("peers") or {row["peer"]: {"us": row["peer_us"]}}
    return sorted(((name, float(of["us"])) for name, of in named.items()), key=lambda t: t[1])


def _rate(value: float | None, roof: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if not roof else f"{value:.2f} ({100 * value / roof:.0f} %)"
