"""Every example runs to its last assert, on NumPy and, marked ``gpu``, on a GPU."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((REPO / "examples").glob("*.py"))
IDS = [path.stem for path in EXAMPLES]


def run(path: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(path)],
        env={**os.environ, "PYTHONPATH": str(REPO)} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_they_are_numbered():
    assert [int(path.stem[:2]) for path in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=IDS)
def test_banner_and_last_statement(path):
    tree = ast.parse(path.read_text())
    banner = ast.get_docstring(tree)
    assert re.search(r"^Needs   \w", banner, re.M) and re.search(r"^Shows   \w", banner, re.M)
    asserts = [node for node in ast.walk(tree.body[-1]) if isinstance(node, ast.Assert)]
    assert asserts, f"{path.name} does not end in an assert"


@pytest.mark.parametrize("path", EXAMPLES, ids=IDS)
def test_on_numpy(path):
    out = run(path, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    assert "numpy" in out and "cupy" not in out


@pytest.mark.gpu
@pytest.mark.parametrize("path", EXAMPLES, ids=IDS)
def test_on_a_gpu(path):
    assert "cupy" in run(path, XLA_PYTHON_CLIENT_PREALLOCATE="false")
