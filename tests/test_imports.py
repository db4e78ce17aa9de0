"""Who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("infinilm", "infinilm_hookspecs")

# What each part of the house may import of infinilm; the contract is open to all of it.
LAYERS = {
    "cli": {
        *("cli", "server", "async_llm", "llm", "pipeline", "plugins", "loading", "native", "testing"),
        *("outputs", "sampling_params"),
    },
    "server": {"server", "async_llm", "llm", "plugins", "engine", "outputs", "sampling_params"},
    "llm": {"pipeline", "plugins", "loading", "engine", "progress", "generation_config", "outputs", "sampling_params"},
    "async_llm": {"llm", "engine", "outputs", "sampling_params"},
    "pipeline": {"plugins", "loading", "hub", "checkpoint_view"},
    "hub": set(),
    "checkpoint_view": set(),
    "generation_config": {"plugins", "sampling_params"},
    "plugins": {"plugins", "native"},
    "native": {"native"},
    "cmake": set(),
    "loading": {"loading"},
    "engine": {"engine", "outputs", "sampling_params"},
    "models": {"models"},
    "checkpoints": {"checkpoints"},
    "processors": {"processors"},
    "backends": {"backends", "native"},
    "platforms": {"platforms"},
    "logits_processors": set(),
    "testing": {"testing", "backends", "platforms", "llm", "sampling_params"},
    "progress": set(),
    "outputs": set(),
    "sampling_params": set(),
}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_contract_imports_pluggy_and_the_standard_library_alone() -> None:
    allowed = {"pluggy", "infinilm_hookspecs", *sys.stdlib_module_names}
    for path in (ROOT / "infinilm_hookspecs").rglob("*.py"):
        typed = {"torch", "numpy"} if "TYPE_CHECKING" in path.read_text() else set[str]()
        roots = {name.partition(".")[0] for name in imported(path)}
        assert roots <= allowed | typed, f"{path.name} imports {roots - allowed - typed}"


@pytest.mark.parametrize("part", sorted(LAYERS))
def test_imports_go_one_way(part: str) -> None:
    files = [p for p in modules() if p.relative_to(ROOT).parts[:2] in (("infinilm", part), ("infinilm", f"{part}.py"))]
    assert files, f"LAYERS names {part!r}, which is gone"
    parts = {path.stem if path.parent.name == "infinilm" else path.parent.name for path in modules()}
    for path in files:
        theirs = {name.split(".")[1] for name in imported(path) if name.startswith("infinilm.")} & {*LAYERS, *parts}
        assert theirs <= LAYERS[part], f"{path.relative_to(ROOT)} imports infinilm.{theirs - LAYERS[part]}"


def test_every_part_has_its_place_in_the_layers() -> None:
    found = {path.stem for path in (ROOT / "infinilm").glob("*") if path.is_dir() or path.suffix == ".py"}
    assert found - {"__init__", "__main__", "__pycache__"} == set(LAYERS)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import infinilm",
        "import infinilm.plugins",
        "import infinilm_hookspecs",
        "from infinilm.cli import main; assert main(['plugins', 'list', '--json']) == 0",
    ],
)
def test_light_imports_load_neither_torch_nor_transformers(code: str) -> None:
    names = ("torch", "transformers", "numpy", "tokenizers", "fastapi", "pydantic")
    heavy = f"[m for m in {names} if m in __import__('sys').modules]"
    assert run(f"{code}\nprint({heavy})").splitlines()[-1] == "[]"


def test_import_of_infinilm_is_cheap() -> None:
    """A hundred milliseconds over a bare interpreter is the promise; the modules it loads are what can be counted."""
    code = "import sys; before = set(sys.modules); import infinilm; print(len(set(sys.modules) - before))"
    assert int(run(code)) < 40


def test_no_file_outside_models_names_a_family() -> None:
    families = [p.stem for p in (ROOT / "infinilm" / "models").glob("*.py") if not p.stem.startswith("_")]
    for path in modules():
        if path.parent.name == "models":
            continue
        tree = ast.parse(path.read_text())
        documented = {id(n.body[0].value) for n in ast.walk(tree) if _has_docstring(n)}  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                assert node.value not in families, f"{path.relative_to(ROOT)}:{node.lineno} names {node.value!r}"


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return isinstance(node, kinds) and bool(node.body) and isinstance(node.body[0], ast.Expr)
