"""The house: imports point down only, never in a circle, function-level imports included."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from graphlib import TopologicalSorter

SOURCE = pathlib.Path(__file__).parents[2] / "src"
FLOORS = {
    "core": 0,
    "format": 1,
    "stores": 1,
    "state": 2,
    "catalog": 2,
    "saving": 3,
    "restoring": 3,
    "distributed": 3,
    "policies": 3,
    "loop": 4,
    "analysis": 4,
    "export": 4,
    "checkpoint": 4,
    "replication": 4,
    "checkpointer": 4,
    "functional": 4,
    "run": 4,
    "errors": 1,
    "integrations": 5,
    "cli": 6,
    "__main__": 7,
    "testing": 7,
}
# Imports inside functions exist for optional dependencies, for frameworks, for the lazy public names, and where the
# light writer process would have to load numpy for what it never meets: a packed file.
LAZY_IMPORTS_ALLOWED = {
    "holdfast.format.rounding",
    "holdfast",
    "holdfast.analysis.picture",
    "holdfast.catalog.unpacking",
    "holdfast.format.signing",
    "holdfast.state.adapters",
    "holdfast.state.registry",
    "holdfast.state.sampler",
    "holdfast.stores.services",
    "holdfast.stores.urls",
    "holdfast.testing",  # its suite needs pytest
}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, ast.Module]:
    return {module_name(p): ast.parse(p.read_text()) for p in sorted((SOURCE / "holdfast").rglob("*.py"))}


def imported(tree: ast.AST, known: set[str], *, typing_only: bool = False) -> set[str]:
    """Every holdfast module that a tree imports, those under TYPE_CHECKING left out."""
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {child for stmt in node.body for child in ast.walk(stmt)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                child = f"{node.module}.{a.name}"
                found |= {child if child in known else node.module} & known
    return found


def floor(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else None


def test_imports_point_down() -> None:
    found = modules()
    for name, tree in found.items():
        here = floor(name)
        if here is None:
            continue
        for other in imported(tree, set(found)):
            there = floor(other)
            assert there is None or there <= here, f"{name} (floor {here}) imports {other} (floor {there})"


def test_no_circles() -> None:
    found = modules()
    graph = {name: imported(tree, set(found)) - {name} for name, tree in found.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_frameworks_only_in_adapters() -> None:
    frameworks = {"torch", "jax", "keras", "tensorflow", "lightning", "transformers"}
    for name, tree in modules().items():
        if name.startswith("holdfast.state.adapters") or (floor(name) or 0) > 4:
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = {n.split(".")[0] for n in names} & frameworks
            assert not bad, f"{name} imports {bad}"


def test_lazy_imports_are_few() -> None:
    for name, tree in modules().items():
        lazy = [
            stmt.lineno
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for stmt in ast.walk(node)
            if isinstance(stmt, (ast.Import, ast.ImportFrom))
        ]
        assert not lazy or name in LAZY_IMPORTS_ALLOWED, f"{name} imports inside functions, at lines {lazy}"


def test_files_stay_small() -> None:
    for path in (SOURCE / "holdfast").rglob("*.py"):
        lines = path.read_text().count("\n")
        assert lines <= 400, f"{path} has {lines} lines; past 400 it wants splitting"


def test_import_loads_neither_numpy_nor_torch() -> None:
    code = "import sys, holdfast; print([m for m in ('numpy', 'torch', 'msgspec', 'rich', 'typer') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_look_at_the_history_does_not_wait_for_numpy(tmp_path: pathlib.Path) -> None:
    run = str(tmp_path / "run")
    save = f"import numpy as np, holdfast; holdfast.save({run!r}, {{'m': {{'w': np.ones(3)}}}}, step=7)"
    look = f"import sys, holdfast; print(holdfast.Run({run!r}).latest.step, 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", save], check=True)
    out = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "7 False"


def test_reading_needs_no_torch(tmp_path: pathlib.Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing torch fails from here on
import numpy as np, holdfast
holdfast.save({str(tmp_path / "run")!r}, {{"weights": {{"w": np.arange(6.0).reshape(2, 3)}}, "epoch": 3}})
assert holdfast.open({str(tmp_path / "run")!r})["weights/w"][1].tolist() == [3.0, 4.0, 5.0]
assert holdfast.load({str(tmp_path / "run")!r})["epoch"] == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    import holdfast

    assert holdfast.__all__ == sorted(holdfast.__all__)
    assert len(holdfast.__all__) <= 25
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None


def test_obstore_is_loaded_by_those_who_open_an_object_store() -> None:
    code = "import sys, holdfast.saving.server, holdfast.run; print([m for m in ('obstore', 'boto3') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
