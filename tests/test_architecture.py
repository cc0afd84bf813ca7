"""Who may import whom, read off the source: passes change a program, exporter lowers and judges it, runtimes run it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("exporter", "passes", "runtimes")
ENGINES = {"onnxruntime", "tensorrt", "tensorrt_rtx"}
THIRD_PARTY = {"torch", "numpy", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "safetensors", "click", "rich", "jinja2"}
OPTIONAL = ENGINES | {"transformers"}
"""Imported inside a function only: the product works without them."""

NEVER = {
    "passes": {"exporter", "runtimes", "onnx", "onnx_ir", "onnxscript", *ENGINES},
    "runtimes": {"exporter", "passes", "onnx", "onnx_ir", "onnxscript", "torch"},
    "exporter/formats": {"exporter.backends", "exporter.cli"},
    "exporter/lowering": {"exporter.backends", "exporter.validate", "exporter.cli", "exporter.compile"},
    "exporter/backends": {"exporter.validate", "exporter.cli", "exporter.compile"},
    "exporter/validate.py": {"exporter.backends", "exporter.cli", "exporter.compile"},
    "exporter/cli.py": {"passes", "runtimes", "exporter.backends"},
    "exporter/report.py": {"torch", "passes", "runtimes", "exporter.backends", "exporter.compile"},
    "exporter/render": {"torch", "passes", "runtimes", "exporter.backends", "exporter.compile"},
}
EXCEPT = {"runtimes/eager.py": {"torch"}}


def sources() -> list[Path]:
    return [*sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")), ROOT / "qexport.py"]


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; of `from a import b` both a and a.b, as b may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_what_its_room_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    banned = {package for room, packages in NEVER.items() if is_under_folder(name, room) for package in packages}
    banned -= EXCEPT.get(name, set())
    assert [found for found in imports(path) if any(is_under(found, package) for package in banned)] == []


def is_under_folder(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}/")


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert [found for found in imports(path, top_only=True) if found.partition(".")[0] in OPTIONAL] == []


def test_only_declared_packages_are_imported() -> None:
    known = THIRD_PARTY | OPTIONAL | set(ROOMS) | set(sys.stdlib_module_names)
    found = {name.partition(".")[0] for path in sources() for name in imports(path)}
    assert found <= known
    assert "tools" not in found  # the reference networks are for tests and benches


def test_importing_the_product_loads_no_engine() -> None:
    engines = sorted(OPTIONAL)
    script = f"import sys, qexport; print([name for name in {engines} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_face_offers_what_it_says() -> None:
    import qexport

    assert {"compile_model", "load", "Recipe", "Report", "Gate", "QExportError"} <= set(qexport.__all__)
    assert all(hasattr(qexport, name) for name in qexport.__all__)
