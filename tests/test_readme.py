"""What the documents say: Python runs, commands parse, tables and links match the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cumoe import RoutingMethod, group
from cumoe.cli import build_parser
from cumoe.formulas import ACTIVATIONS
from cumoe.layouts import GATE_UP_ORDERS

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A Python block, its first line in the README, and what a comment before it says it needs."""

    line: int
    code: str
    needs: frozenset[str]


def python_blocks() -> list[Block]:
    pattern = re.compile(r"(?:<!-- needs: ([\w ]+) -->\n)?```python\n(.*?)```", re.DOTALL)
    blocks = []
    for match in pattern.finditer(README):
        line = README[: match.start(2)].count("\n") + 1
        blocks.append(Block(line, match[2], frozenset((match[1] or "").split())))
    return blocks


def run(blocks: list[Block]) -> None:
    """Run blocks one after the other in one namespace, with the README's line numbers."""
    namespace: dict[str, Any] = {}
    for block in blocks:
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, str(REPO / "README.md"), "exec"), namespace)


def section(title: str) -> str:
    return re.split(r"^#+ ", README.partition(f"# {title}\n")[2], flags=re.M)[0]


def first_cells(title: str) -> list[str]:
    """The names in the first column of a section's table."""
    rows = re.findall(r"^\| (`.*?) \|", section(title), re.M)
    return [name for row in rows[1:] for name in re.findall(r"`\"?(\w+)\"?`", row)]


class TestPython:
    def test_there_are_blocks(self):
        needs = [block.needs for block in python_blocks()]
        assert len(needs) >= 6 and frozenset() in needs and {"gpu"} in needs

    def test_without_a_gpu(self):
        run([block for block in python_blocks() if not block.needs])

    @pytest.mark.parametrize("block", python_blocks(), ids=lambda block: f"line {block.line}")
    def test_syntax(self, block):
        compile(block.code, "README.md", "exec")

    @pytest.mark.gpu
    def test_with_a_gpu(self):
        here = {"gpu"} | ({"torch"} if importlib.util.find_spec("torch") else set())
        run([block for block in python_blocks() if block.needs <= here])


class TestCommands:
    COMMANDS = re.findall(r"^python -m cumoe (.*?)(?:  .*)?$", README, re.M)

    def test_there_are_commands(self):
        assert {command.split()[0] for command in self.COMMANDS} == {"demo", "doctor", "warmup"}

    @pytest.mark.parametrize("command", COMMANDS)
    def test_parses(self, command):
        build_parser().parse_args(shlex.split(command))

    def test_make_targets_exist(self):
        makefile = (REPO / "Makefile").read_text()
        targets = set(re.findall(r"^make ([\w-]+)", README, re.M))
        assert {"demo", "test", "test-gpu", "test-multigpu", "bench"} <= targets
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


class TestTables:
    def test_every_routing_method(self):
        assert sorted(first_cells("Routing methods")) == sorted(m.value for m in RoutingMethod)

    def test_every_activation(self):
        assert sorted(first_cells("Activation")) == sorted(ACTIVATIONS)

    def test_every_gate_up_order(self):
        names = re.findall(r"^\| `\"(\w+)\"` \|", section("Gate and up"), re.M)
        assert sorted(names) == sorted(GATE_UP_ORDERS)

    def test_every_environment_variable(self):
        """Those that the package reads, and no other; at most six."""
        read = set()
        for path in (REPO / "cumoe").rglob("*.py"):
            read |= set(re.findall(r"""environ[^\n]*["'](CUMOE_\w+)["']""", path.read_text()))
        told = set(re.findall(r"^\| `(CUMOE_\w+)` \|", README, re.M))
        assert read == told and len(told) <= 6

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_and_paths_exist(self, page):
        text = page.read_text()
        paths = set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
        paths |= set(re.findall(r"`((?:docs|examples|bench|cumoe|tests)/[\w./]*)`", text))
        base = page.parent
        missing = [p for p in paths if not (base / p).exists() and not (REPO / p).exists()]
        assert not missing


class TestConcepts:
    def test_rows(self):
        """The drawing of a permutation shows what :func:`cumoe.group` returns."""
        text = (REPO / "docs" / "concepts.md").read_text()
        drawing = text.partition("```text\n")[2].partition("```")[0]
        ids = re.findall(r"\[+(\d), (\d)\]", drawing.replace("[[8, 0], [9, 4], [1, 10]]", ""))
        p = group(np.array(ids, np.int32), num_experts=4, tile=4)
        for name in ("tokens_per_expert", "expert_offsets", "permuted_idx"):
            stated = re.search(rf"{name} += (\[.*\])$", drawing, re.M)
            assert ast.literal_eval(stated[1]) == getattr(p, name).tolist()
        rows = re.search(r"^token_idx (.*)$", drawing, re.M)[1].replace("|", " ").split()
        assert [int(token) for token in rows] == p.token_idx[:12].tolist()
        assert (p.token_idx[12:] == -1).all()
