"""The rules that hold the project together: layers, imports, CUDA sources, file sizes, packaging.

Everything here reads source text or starts a fresh interpreter; nothing is imported into the tests.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "cumoe"
CU = PACKAGE / "cu"

LAYERS = (
    {"", "__main__", "cli", "demo", "doctor", "warmup"},
    {"compat", "comm"},
    {"moe", "plan", "layer_call"},
    {"routing", "permutation", "grouped_gemm", "activation", "finalize", "quantize"}
    | {"custom_activation", "dequantize", "calibrate"},
    {
        "weights",
        "weight_arrays",
        "checkpoint",
        "layouts",
        "arrays",
        "config",
        "tuning",
        "models",
        "validate",
    }
    | {
        "microscaling",
        "kernels",
        "kernels_activation",
        "kernels_comm",
        "kernels_quantize",
        "kernels_routing",
        "kernels_sm90",
        "params",
        "reference",
        "formulas",
    },
    {"launch"},
)
"""Names in cumoe from the top down (``""`` is ``cumoe/__init__.py``): imports go down or sideways.

A new module or package is given its place here.
"""

OUTSIDE = {"numpy", "ml_dtypes"}
"""What any module may import when it is loaded, beside the standard library."""

OUTSIDE_BY_LAYER = {name: {"rich"} for name in LAYERS[0] - {""}} | {"launch": {"filelock"}}

MAX_LINES = {".py": 500, ".cu": 450, ".cuh": 450}
ASM_FILES = {"ptx.cuh", "sync.cuh", "tma.cuh", "wgmma.cuh"}


class Import(NamedTuple):
    """One import statement of one module: what it names, and whether it runs at load."""

    source: str
    target: str
    line: int
    at_load: bool


def python_files() -> list[Path]:
    folders = [PACKAGE, REPO / "bench", REPO / "tests"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def cuda_files() -> list[Path]:
    return sorted(path for path in CU.rglob("*") if path.suffix in (".cu", ".cuh"))


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPO)) for path in paths]


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int:
    """The index in LAYERS of a module of cumoe; a new top-level name must be given a place."""
    name = (module.split(".") + [""])[1]
    for index, names in enumerate(LAYERS):
        if name in names:
            return index
    raise AssertionError(f"{module}: give {name!r} a place in LAYERS of tests/test_project.py")


def statements(tree: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import statement below `tree`, with whether it runs when the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, at_load
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from statements(child, at_load)
        else:
            in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from statements(node, at_load and not in_function)


def imports(module: str) -> list[Import]:
    """The imports of a module of cumoe, relative ones resolved, down to the submodule named."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node, at_load in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [base])])
            named = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in MODULES else base for name in named]
        found += [Import(module, target, node.lineno, at_load) for target in targets]
    return found


IMPORTS = [found for module in MODULES for found in imports(module)]


def is_inside(target: str, *packages: str) -> bool:
    return any(target == package or target.startswith(f"{package}.") for package in packages)


def violations(found: list[Import]) -> str:
    return "\n".join(f"{i.source}:{i.line} imports {i.target}" for i in found)


class TestLayers:
    @pytest.mark.parametrize("module", MODULES)
    def test_every_module_has_a_place(self, module):
        layer_of(module)

    def test_imports_go_down(self):
        bad = [
            i
            for i in IMPORTS
            if i.at_load
            and is_inside(i.target, "cumoe")
            and layer_of(i.target) < layer_of(i.source)
        ]
        assert not bad, violations(bad)

    def test_no_import_cycles(self):
        edges: dict[str, set[str]] = {module: set() for module in MODULES}
        for i in IMPORTS:
            if i.at_load and i.target in MODULES and i.target != i.source:
                edges[i.source].add(i.target)
        done: set[str] = set()
        path: list[str] = []

        def visit(module: str) -> None:
            assert module not in path, " -> ".join([*path[path.index(module) :], module])
            if module in done:
                return
            path.append(module)
            for target in sorted(edges[module]):
                visit(target)
            path.pop()
            done.add(module)

        for module in MODULES:
            visit(module)

    def test_launch_stands_alone(self):
        bad = [
            i
            for i in IMPORTS
            if is_inside(i.source, "cumoe.launch")
            and is_inside(i.target, "cumoe")
            and not is_inside(i.target, "cumoe.launch")
        ]
        assert not bad, violations(bad)

    @pytest.mark.parametrize(
        "path", sorted((PACKAGE / "launch").rglob("*.py")), ids=lambda p: p.name
    )
    def test_launch_knows_no_moe_word(self, path):
        word = re.compile(r"(^|_)(moe|experts?|routing|routed|top_?k|tokens)(_|$)", re.IGNORECASE)
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        names = {t.string for t in tokens if t.type == tokenize.NAME}
        assert not {name for name in names if word.search(name)}

    def test_reference_and_config_are_host_only(self):
        bad = [
            i
            for i in IMPORTS
            if is_inside(i.source, "cumoe.reference", "cumoe.config")
            and is_inside(i.target, "cupy", "cupyx", "cuda", "cumoe.launch")
        ]
        assert not bad, violations(bad)

    def test_config_imports_the_table_of_activations_only(self):
        allowed = {"cumoe.config": {"cumoe.formulas"}, "cumoe.formulas": set()}
        bad = [
            i
            for i in IMPORTS
            if i.source in allowed
            and is_inside(i.target, "cumoe")
            and i.target not in allowed[i.source]
        ]
        assert not bad, violations(bad)

    def test_no_torch(self):
        bad = [i for i in IMPORTS if is_inside(i.target, "torch")]
        assert not bad, violations(bad)

    def test_only_base_dependencies_at_load(self):
        """Everything optional (CuPy, cuda-python, MPI, JAX) is imported on use."""
        bad = []
        for i in IMPORTS:
            top = i.target.split(".")[0]
            allowed = OUTSIDE | OUTSIDE_BY_LAYER.get((i.source.split(".") + [""])[1], set())
            known = top == "cumoe" or top in sys.stdlib_module_names or top in allowed
            if i.at_load and not known:
                bad.append(i)
        assert not bad, violations(bad)


class TestImport:
    CODE = """
import sys, numpy, ml_dtypes
before = set(sys.modules)
import cumoe
new = set(sys.modules) - before
print("modules", len(new))
banned = ("torch", "cupy", "cupyx", "cupy_backends", "cuda", "jax", "mpi4py", "nccl", "rich")
print("banned", *sorted(m for m in new if m.split(".")[0] in banned))
try:
    maps = open("/proc/self/maps").read()
except OSError:
    maps = ""
print("libraries", *[name for name in ("libcuda.so", "libcudart", "libnvrtc") if name in maps])
"""

    def test_import_cumoe_is_light(self):
        done = subprocess.run(
            [sys.executable, "-c", self.CODE], cwd=REPO, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
        assert found["banned"] == []
        assert found["libraries"] == []
        assert int(found["modules"][0]) <= 200


class TestCuda:
    @staticmethod
    def code(path: Path) -> str:
        """The text without comments, line numbers kept."""
        comment = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)

        def blank(match: re.Match[str]) -> str:
            return match[0] if match[0][0] == '"' else re.sub(r"[^\n]", " ", match[0])

        return comment.sub(blank, path.read_text())

    @classmethod
    def device_lines(cls, path: Path) -> Iterator[str]:
        """The lines that NVRTC reads: those of branches for a host compiler are left out."""
        branches: list[bool | None] = []  # per #if: in its NVRTC branch? None: about something else
        for line in cls.code(path).splitlines():
            directive = re.match(r"\s*#\s*(ifdef|ifndef|if|elif|else|endif)\b(.*)", line)
            if not directive:
                if False not in branches:
                    yield line
            elif directive[1] == "endif":
                branches.pop()
            elif directive[1] in ("elif", "else"):
                branches[-1] = None if branches[-1] is None else not branches[-1]
            elif "__CUDACC_RTC__" in directive[2]:
                branches.append(directive[1] != "ifndef" and "!" not in directive[2])
            else:
                branches.append(None)

    @pytest.mark.parametrize("path", cuda_files(), ids=ids(cuda_files()))
    def test_inline_asm_only_in_the_wrappers(self, path):
        if path.parent == CU and path.name in ASM_FILES or path.parent == CU / "ptx":
            return
        lines = [
            number
            for number, line in enumerate(self.code(path).splitlines(), 1)
            if re.search(r"\b(asm|__asm__|__asm)\b", line)
        ]
        assert not lines, f"inline asm in {path.name}, lines {lines}"

    @pytest.mark.parametrize("path", cuda_files(), ids=ids(cuda_files()))
    def test_includes_stay_in_the_folder(self, path):
        for line in self.device_lines(path):
            if not re.match(r"\s*#\s*include\b", line):
                continue
            match = re.match(r'\s*#\s*include\s+"([^"]+)"\s*$', line)
            assert match, f"{path.name}: expected a quoted file of cumoe/cu, got {line.strip()!r}"
            places = [(folder / match[1]).resolve() for folder in (path.parent, CU)]
            inside = [p for p in places if p.is_file() and p.is_relative_to(CU.resolve())]
            assert inside, f"{path.name}: {match[1]!r} is no file of cumoe/cu"

    @pytest.mark.parametrize("path", cuda_files(), ids=ids(cuda_files()))
    def test_headers_have_pragma_once(self, path):
        pragma = "#pragma once" in self.code(path)
        assert pragma == (path.suffix == ".cuh")


class TestFiles:
    @pytest.mark.parametrize(
        "path", python_files() + cuda_files(), ids=ids(python_files() + cuda_files())
    )
    def test_size(self, path):
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= MAX_LINES[path.suffix], f"{path.name} has {num_lines} lines"

    @pytest.mark.parametrize("module", MODULES)
    def test_module_docstring(self, module):
        assert ast.get_docstring(ast.parse(MODULES[module].read_text())), f"{module} has none"


class TestPackaging:
    PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())

    def test_base_forces_no_cuda(self):
        base = " ".join(self.PROJECT["project"]["dependencies"])
        assert not re.search(r"cupy|cuda|nvidia|torch|jax", base)

    def test_cuda_extras_exclude_each_other(self):
        assert self.PROJECT["tool"]["uv"]["conflicts"] == [[{"extra": "cu12"}, {"extra": "cu13"}]]

    def test_kernels_are_package_data(self):
        patterns = self.PROJECT["tool"]["setuptools"]["package-data"]["cumoe"]
        packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
        assert set(cuda_files()) <= packed

    def test_every_package_has_an_init(self):
        """Folders without one are left out of the wheel."""
        folders = {path.parent for path in MODULES.values()} - {PACKAGE}
        assert not [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()]

    def test_version(self):
        init = PACKAGE / "__init__.py"
        stated = (
            re.search(r'^__version__ = "(.+)"$', init.read_text(), re.M) if init.exists() else None
        )
        assert stated is None or stated[1] == self.PROJECT["project"]["version"]

    @pytest.mark.parametrize("tool", ["ruff", "mypy", "clang-format"])
    def test_pre_commit_pins_the_same_tools(self, tool):
        extra = " ".join(self.PROJECT["project"]["optional-dependencies"]["test"])
        series = re.search(rf"{tool}==([\d.]+)\.\*", extra)
        assert series
        hooks = re.findall(rf"\b{tool}==([\d.]+)", (REPO / ".pre-commit-config.yaml").read_text())
        assert hooks and all(pin.startswith(f"{series[1]}.") for pin in hooks)
