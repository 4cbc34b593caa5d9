"""How long a user waits at the start, and how much an installation takes on disk.

    python -m bench.bench_startup                  # import, first calls: bench/results/startup.json
    python -m bench.bench_startup --install-size   # the size of a fresh install; needs no GPU
    python -m bench.bench_startup --dry-run        # a tiny layer on NumPy

Rows: ``import_cumoe``; ``first_call``, from the weights on the GPU to the first result (variant
``cold``: empty kernel cache; ``warm``: filled one); ``second_call``; ``compile``, each of the
layer's kernels alone; ``install_size``, in ``mbytes``. Every figure of a start is that of a fresh
process, the median over several. The install row keeps the origin of its own run, as it is measured
where packages can be fetched.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.arguments import make_parser
from bench.harness import HostClock, Timing
from bench.inputs import TINY, find_backend, find_model, make_bias, make_call, make_layer
from bench.inputs import make_weights as make_random_weights
from bench.record import REPO, Row, check_row, make_row, print_table, write_results
from bench.shapes import ModelShape, Recipe
from cumoe import ExpertWeights
from cumoe.checkpoint import num_blocks

RESULTS = REPO / "bench" / "results" / "startup.json"
RECIPES: tuple[Recipe, ...] = ("fp8_block", "bf16")
PACKAGE_FILES = ("pyproject.toml", "README.md", "LICENSE", "cumoe")
IMPORT_CODE = (
    "import time; start = time.perf_counter_ns(); import cumoe; "
    "print((time.perf_counter_ns() - start) / 1e3)"
)


def run_fresh(arguments: Sequence[str], **environment: str) -> str:
    """Run this Python in a process of its own, in the repository, and return its last line.

    Raises
    ------
    RuntimeError
        If it fails; the message ends with what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def import_times(repeats: int) -> Timing:
    """Time ``import cumoe`` in fresh processes, NumPy's import included; files are in memory."""
    run_fresh(["-c", IMPORT_CODE])
    return Timing.of(float(run_fresh(["-c", IMPORT_CODE])) for _ in range(repeats))


def once_us(run: Callable[[], object]) -> float:
    """Time what can be done only once in a process."""
    clock = HostClock()
    return clock.sample(clock.prepare(lambda i: run(), graph=False), 0, False)


def first_call(model: str, recipe: Recipe, num_tokens: int, backend: str) -> Row:
    """Time the first and the second call of a layer in this process, in microseconds."""
    xp = find_backend(backend)
    shape = find_model(model, shared=False)
    weights = _blank_weights(shape, recipe, xp)
    bias = make_bias(shape, xp, seed=0)
    x, logits = make_call(shape, num_tokens, xp, seed=0)

    def wait() -> None:
        if xp is not np:
            xp.cuda.Device().synchronize()

    layers: list[Any] = []

    def first() -> None:
        layers.append(make_layer(shape, weights, bias, num_tokens))
        second()

    def second() -> None:
        layers[0](x, logits)
        wait()

    wait()
    return {"first_us": once_us(first), "second_us": once_us(second)}


def _blank_weights(shape: ModelShape, recipe: Recipe, xp: Any) -> ExpertWeights:
    """Return weights of any content on a GPU, where filling them would compile CuPy's kernels."""
    if xp is np:
        return make_random_weights(shape, recipe, xp, seed=0)
    import ml_dtypes

    count = shape.num_experts + shape.num_shared_experts
    hidden, size = shape.hidden_size, shape.intermediate_size
    dtype = np.dtype(np.uint8 if recipe == "fp8_block" else ml_dtypes.bfloat16)
    payloads = (xp.empty((count, 2 * size, hidden), dtype), xp.empty((count, hidden, size), dtype))
    if recipe == "bf16":
        return ExpertWeights(*payloads, gate_up_order="gate_up")
    rows, columns = num_blocks(size), num_blocks(hidden)
    grids = ((count, 2 * rows, columns), (count, columns, rows))
    scales = (xp.empty(grid, np.float32) for grid in grids)
    return ExpertWeights(*payloads, *scales, gate_up_order="gate_up")


def compile_times(model: str, recipe: Recipe, num_tokens: int) -> dict[str, float]:
    """Time the compile of each kernel of a layer, in microseconds by ``stage/kernel``."""
    import cupy

    from cumoe.launch import compile_cubin, get_device

    shape = find_model(model, shared=False)
    weights = _blank_weights(shape, recipe, cupy)
    bias = make_bias(shape, cupy, seed=0)
    plan = make_layer(shape, weights, bias, num_tokens).plan(num_tokens)
    arch = get_device(int(weights.w13.device.id)).arch
    specs = {
        f"{stage}/{item.spec.name}": item.spec for stage, s in plan.stages.items() for item in s
    }
    if specs:  # NVRTC is loaded once in a process
        compile_cubin(next(iter(specs.values())), arch, use_cache=False)
    return {
        name: once_us(functools.partial(compile_cubin, spec, arch, use_cache=False))
        for name, spec in specs.items()
    }


def worker(job: Mapping[str, Any]) -> int:
    """Do one job of a fresh process and print its figures as a line of JSON."""
    tasks: dict[str, Callable[..., Row]] = {"first_call": first_call, "compile": compile_times}
    arguments = {name: value for name, value in job.items() if name != "task"}
    print(json.dumps(tasks[job["task"]](**arguments)))
    return 0


def run_worker(job: Mapping[str, Any], **environment: str) -> dict[str, float]:
    """Run :func:`worker` in a fresh process and return its figures."""
    line = run_fresh(["-m", "bench.bench_startup", "--worker", json.dumps(job)], **environment)
    figures: dict[str, float] = json.loads(line)
    return figures


def first_calls(job: Mapping[str, Any], cold_repeats: int, warm_repeats: int) -> list[Row]:
    """Measure first calls with empty and filled kernel caches and return their rows."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory(prefix="cumoe-bench-") as folder:
        for i in range(cold_repeats):
            found["cold"].append(run_worker(job, CUMOE_CACHE_DIR=f"{folder}/{i}"))
        for _ in range(warm_repeats):
            found["warm"].append(run_worker(job, CUMOE_CACHE_DIR=f"{folder}/0"))
    key = {name: job[name] for name in ("model", "recipe", "num_tokens")}
    rows = []
    for variant, figures in found.items():
        timing = Timing.of(f["first_us"] for f in figures)
        rows.append(make_row("first_call", timing=timing, variant=variant, **key))
    timing = Timing.of(f["second_us"] for f in found["warm"])
    return [*rows, make_row("second_call", timing=timing, **key)]


def compile_rows(job: Mapping[str, Any]) -> list[Row]:
    """Measure each kernel's compile once and return their rows."""
    key = {name: job[name] for name in ("model", "recipe", "num_tokens")}
    return [
        make_row("compile", timing=Timing.of([us]), variant=name, **key)
        for name, us in run_worker(job).items()
    ]


def install_row(extra: str) -> Row:
    """Install this checkout with an extra into a new environment and return what it adds, in MB.

    Bytes of all files under ``site-packages`` after the install, bytecode included, less those
    that the empty environment (pip) had.

    Raises
    ------
    RuntimeError
        If the install fails.
    """
    with tempfile.TemporaryDirectory(prefix="cumoe-install-") as name:
        folder = Path(name)
        source = folder / "source"
        source.mkdir()
        skip = shutil.ignore_patterns("__pycache__")
        for item in PACKAGE_FILES:
            path = REPO / item
            if path.is_dir():
                shutil.copytree(path, source / item, ignore=skip)
            else:
                shutil.copy(path, source / item)
        run_fresh_install(folder / "env", [])
        site = next((folder / "env").glob("lib*/python*/site-packages"))
        before, base = _num_bytes(site), _dist_bytes(site)
        run_fresh_install(folder / "env", [f"{source}[{extra}]"])
        added = _num_bytes(site) - before
        packages = {name: n for name, n in _dist_bytes(site).items() if name not in base}
    largest = sorted(packages.items(), key=lambda item: -item[1])[:10]
    row: Row = {
        "op": "install_size",
        "model": None,
        "recipe": None,
        "num_tokens": 0,
        "num_gpus": 1,
        "variant": extra,
        "mbytes": added / 1e6,
        "largest_mbytes": {name: round(size / 1e6, 2) for name, size in largest},
    }
    return check_row(row)


def run_fresh_install(environment: Path, requirements: Sequence[str]) -> None:
    """Make the virtual environment if there is none, and install the requirements into it."""
    python = environment / "bin" / "python"
    commands = [] if python.exists() else [[sys.executable, "-m", "venv", str(environment)]]
    if requirements:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        commands.append([*pip, *requirements])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _num_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _dist_bytes(site: Path) -> dict[str, int]:
    """Return the bytes of each distribution in a ``site-packages``, by name."""
    sizes = {}
    for dist in metadata.distributions(path=[str(site)]):
        paths = (Path(str(dist.locate_file(file))) for file in dist.files or ())
        sizes[dist.metadata["Name"]] = sum(p.stat().st_size for p in paths if p.is_file())
    return sizes


def other_machine_rows(path: Path, *, install: bool) -> list[Row]:
    """Return a result file's install rows, or all its other rows, each with its origin."""
    if not path.exists():
        return []
    old = json.loads(path.read_text())
    origin = {n: value for n, value in old.items() if n not in ("rows", "packages", "seed")}
    return [origin | row for row in old["rows"] if (row["op"] == "install_size") == install]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    args = _parser().parse_args(argv)
    if args.worker:
        return worker(json.loads(args.worker))
    dry = args.dry_run
    out = args.out or (None if dry else RESULTS)
    if args.install_size is not None:
        rows = [install_row(extra) for extra in args.install_size or ["cu12"]]
        for row in rows:
            print(f"{row['variant']}: {row['mbytes']:.1f} MB  {row['largest_mbytes']}")
        kept = other_machine_rows(RESULTS if out is None else out, install=False)
    else:
        find_backend("numpy" if dry else "auto")  # stops here without a GPU
        rows = startup_rows(args)
        print_table(rows, console=Console(width=None if sys.stdout.isatty() else 150))
        kept = other_machine_rows(RESULTS, install=True)
    if out is not None:
        write_results(out, kept + rows, seed=0)
    return 0


def startup_rows(args: argparse.Namespace) -> list[Row]:
    """Measure everything but the install."""
    timing = import_times(args.repeats)
    rows = [make_row("import_cumoe", model=None, recipe=None, num_tokens=0, timing=timing)]
    job: dict[str, Any] = {
        "model": args.model or (TINY.name if args.dry_run else "deepseek_v3"),
        "num_tokens": args.tokens,
    }
    backend = "numpy" if args.dry_run else "cupy"
    for recipe in args.recipes:
        call = job | {"task": "first_call", "recipe": recipe, "backend": backend}
        rows += first_calls(call, args.cold_repeats, args.repeats)
        if not args.dry_run:
            rows += compile_rows(job | {"task": "compile", "recipe": recipe})
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("bench.bench_startup", __doc__, RESULTS)
    add = parser.add_argument
    add("--model", metavar="NAME", help="default: deepseek_v3")
    add("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    add("--tokens", type=int, default=64, metavar="T")
    add("--repeats", type=int, default=5, help="processes for imports and warm calls (default: 5)")
    add("--cold-repeats", type=int, default=2, help="processes for cold calls (default: 2)")
    add("--install-size", nargs="*", metavar="EXTRA", help="measure fresh installs only (cu12)")
    add("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
