"""Every kernel under both sanitizers, in a process that is started with their run-time library.

The engine's own checks, and that of alignment, are on in every run. Here UndefinedBehaviorSanitizer
adds its others, and AddressSanitizer every single access of a kernel to the heap, its stack and the
unused part of dynamic shared memory. That takes three times as long, so it runs a sixth of them;
``python -m tests.host.run_cases`` in the environment of ``loader.asan_environment`` runs all.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.host import cases, loader

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=loader.asan_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


GEMMS = ("layer", *(name for name in cases.CASES if "grouped_gemm" in name))
PIECES = {"GEMMs": GEMMS, "others": tuple(name for name in cases.CASES if name not in GEMMS)}


@pytest.mark.sanitizer
@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES)
def test_every_kernel(piece):
    done = run("-m", "tests.host.run_cases", "--once", "--every=6", *PIECES[piece])
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.sanitizer
def test_notices_an_access_past_an_array():
    code = """
from cumoe.launch import KERNEL_DIR
from tests.host import cases, loader
text = (KERNEL_DIR / "quantize_fp8_block.cu").read_text()
assert "row < p.num_rows ?" in text
changed = {"quantize_fp8_block.cu": text.replace("row < p.num_rows ?", "true ?")}
(case,) = (c for c in cases.CASES["quantize_fp8_block"] if c.name == "tails")
cases.check(case, loader.HostOptions(changed=changed))
"""
    done = run("-c", code)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
