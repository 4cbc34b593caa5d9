"""Every kernel, and the whole layer, executed on the CPU against the NumPy twins.

The cases are in ``tests/host/cases.py`` and ``tests/host/layer.py``. A failure names its seed; a
run with the same seed takes the same schedule.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from cumoe.launch import KERNEL_DIR
from tests.host import cases, layer, loader

# Each seed takes another policy of scheduling, and another chance of early landing for copies.
SEEDS = (0, 5, 10, 15)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


def _parameters() -> list[pytest.param]:
    seen: dict[int, str] = {}
    for kernel, table in cases.CASES.items():
        seen.setdefault(id(table), kernel)
    return [
        pytest.param(case, id=f"{kernel}-{case.name}".replace(" ", "_"))
        for kernel, table in cases.CASES.items()
        if seen[id(table)] == kernel
        for case in table
    ]


def test_every_kernel_is_in_the_table():
    assert set(cases.CASES) == {path.stem for path in KERNEL_DIR.glob("*.cu")}
    assert all(cases.CASES.values())


def test_every_wrapper_has_a_model():
    """The headers of the overlay define the functions of the headers they stand for."""
    function = re.compile(
        r"^(?:__device__ __forceinline__|inline) [\w:]+[*&]? (\w+)\(", re.MULTILINE
    )
    replaced = sorted(loader.OVERLAY.glob("*.cuh"))
    assert replaced
    for model in replaced:
        wrappers = function.findall((KERNEL_DIR / model.name).read_text())
        models = set(function.findall(model.read_text()))
        assert wrappers and not set(wrappers) - models, f"{model.name}: {set(wrappers) - models}"


def test_all_inline_assembly_is_replaced():
    replaced = {path.name for path in loader.OVERLAY.glob("*.cuh")}
    for path in [*KERNEL_DIR.glob("*.cu"), *KERNEL_DIR.glob("*.cuh")]:
        if re.search(r"\basm\b", path.read_text()):
            assert path.name in replaced, f"{path.name} has inline assembly and no model"


@pytest.mark.parametrize("case", _parameters())
def test_kernel(case):
    for seed in SEEDS:
        cases.check(case, loader.HostOptions(seed=seed))


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("quantize_fp8_block", "tails"),
        ("quantize_fp8_weights", "tails"),
        ("activation", "fp8 to fp8, experts"),
        ("sm80_grouped_gemm", "fp8 gated to fp8"),
        ("sm80_grouped_gemm", "fp8 plain"),
    ],
)
def test_without_fp8_instructions(kernel, name):
    """Below sm_89 e4m3 is converted in integer arithmetic, to the same bits."""
    (case,) = (c for c in cases.CASES[kernel] if c.name == name)
    cases.check(case, loader.HostOptions(arch=800))


@pytest.mark.parametrize("kernel", sorted(set(cases.CASES) - {"routing_count"}))
def test_blocks_together(kernel):
    """Several blocks of a grid alive at the same time, in random turns."""
    for case in cases.CASES[kernel][-2:]:
        cases.check(case, loader.HostOptions(seed=3, resident=5))


@pytest.mark.parametrize("case", layer.LAYER_CASES, ids=lambda c: c.name.replace(" ", "_"))
@pytest.mark.parametrize("arch", [800, 900])
def test_layer(case, arch):
    """On sm_80, and on sm_90 with its own GEMMs."""
    cases.check(case, loader.HostOptions(seed=SEEDS[arch == 900], arch=arch))


def test_bitwise_repeatable():
    """The schedule changes nothing in the result of a layer."""
    results = []

    def remember(host: cases.Host) -> None:
        weights = layer._weights(host, layer._Shape(9, 144, 80, "fp8_block"), 33)
        x = host.normal((9, 144), cases.BF16)
        logits = host.normal((9, 33), cases.F32)
        routing = layer.Routing("default", 33, 5)
        out = host.empty(x.shape, cases.BF16)
        layer.run_layer(host, x, weights, routing=routing, logits=logits, out=out)
        results.append(out.view(np.uint16).copy())

    for seed in SEEDS:
        cases.check(cases.Case("layer", remember), loader.HostOptions(seed=seed))
    assert all((r == results[0]).all() for r in results)
