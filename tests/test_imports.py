"""Who may import whom: the two wings of phi3c meet at the artifact, and nowhere else.

Read off the syntax tree, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "phi3c"

COMPILE_WING = {
    "kernels",
    "quantization",
    "model",
    "passes",
    "pipeline",
    "targets",
    "linker",
    "device_code",
    "metal",
    "spirv",
    "weights",
    "sources",
    "packing",
    "merged_weights",
    "converter",
    "compiler",
}
SERVE_WING = {"runtime", "engine", "serve"}

# Unit (a file or folder of phi3c/) → the units it may import. "": phi3c itself, whose names are
# loaded when first used.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "triple": set(),
    "logit_blocks": set(),
    "hub": {"config", "errors"},
    "tensor_file": {"errors"},
    "adapters": {"config", "errors", "hub"},
    "manifest": {"adapters", "config", "errors", "tensor_file"},
    "artifact": {"errors", "manifest", "tensor_file"},
    "output_folder": {"artifact", "errors", "memory"},
    "memory": {"manifest", "tensor_file"},
    "vulkan": {"errors", "memory"},
    "cuda": {"errors"},
    # compile wing
    "kernels": set(),
    "quantization": {"kernels", "errors"},
    "model": {"adapters", "config", "kernels", "logit_blocks", "quantization", "errors"},
    "passes": set(),
    "pipeline": {"passes"},
    "spirv": {"errors"},
    "metal": {"errors"},
    "device_code": {"cuda", "errors", "manifest", "metal", "spirv", "targets", "vulkan"},
    "targets": {"cuda", "kernels", "errors", "vulkan"},
    "linker": {"errors", "targets", "triple"},
    "link": {"artifact", "errors", "linker", "targets", "output_folder"},
    "weights": {"config", "errors", "quantization"},
    "sources": {"artifact", "config", "errors", "hub", "manifest", "quantization", "weights"},
    "packing": {"config", "errors", "kernels", "model", "quantization", "tensor_file", "weights"},
    "merged_weights": {"adapters", "config", "quantization", "weights"},
    "converter": {"adapters", "artifact", "config", "errors", "kernels", "manifest"}
    | {"merged_weights", "output_folder", "packing"}
    | {"quantization", "sources", "targets", "tensor_file"},
    "compiler": {"adapters", "artifact", "config", "converter", "device_code", "errors"}
    | {"linker", "manifest"}
    | {"model", "output_folder", "passes", "pipeline", "quantization", "sources", "targets"},
    # serve wing
    "runtime": {"adapters", "artifact", "config", "cuda", "errors", "logit_blocks"}
    | {"manifest", "memory"}
    | {"tensor_file"}
    | {"triple", "vulkan"},
    "engine": {"runtime", "config", "errors", "artifact", "manifest"},
    "serve": {"engine", "runtime", "config", "errors", "artifact"},
    # above both wings
    "readiness": {"cuda", "errors", "linker", "metal", "targets", "vulkan"},
    "": {"config", "artifact", "compiler", "converter", "engine", "runtime"},
    "reference": {"config", "errors"},
    "artifact_cache": {"artifact", "compiler", "converter", "errors", "manifest", "sources"}
    | {"targets"},
    "verify": {"artifact", "config", "errors", "quantization", "reference", "runtime", "sources"},
    "describe": {"artifact", "config", "engine", "errors", "memory", "readiness", "verify"}
    | {"weights"},
    "bench": {
        "engine",
        "errors",
        "kernels",
        "linker",
        "manifest",
        "memory",
        "runtime",
        "targets",
        "tensor_file",
    },
    "arguments": {"errors"},
    "cli": {
        "",
        "arguments",
        "artifact",
        "artifact_cache",
        "bench",
        "compiler",
        "config",
        "converter",
    }
    | {
        "adapters",
        "describe",
        "engine",
        "errors",
        "link",
        "memory",
        "readiness",
        "runtime",
        "serve",
        "sources",
        "targets",
        "verify",
    },
    "__main__": {"cli"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """phi3c/runtime/host.py → phi3c.runtime.host; a package is its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """phi3c.runtime.host → runtime; phi3c → the empty unit."""
    return (module.split(".") + [""])[1]


def imported(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, module, at import time) of every import of ours; relative ones are resolved."""
    tree = ast.parse(path.read_text(), str(path))
    package = dotted(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    inside_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            # `from .. import x` and `from phi3c import x` may name a module or a value.
            names = [f"{base}.{alias.name}" if base == "phi3c" else base for alias in node.names]
        for name in names:
            if name.split(".")[0] == "phi3c":
                yield node.lineno, name, id(node) not in inside_functions


def imported_units(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, unit, at import time); a value of phi3c/__init__.py is of the empty unit."""
    for line, module, eager in imported(path):
        is_module = unit(module) in {unit(dotted(p)) for p in modules()}
        yield line, unit(module) if is_module else "", eager


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def test_every_unit_has_a_line_in_the_table():
    units = {unit(dotted(path)) for path in modules()}
    assert units <= set(MAY_IMPORT), (
        f"say in MAY_IMPORT what {sorted(units - set(MAY_IMPORT))} may import"
    )


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_follow_the_table(path):
    own = unit(dotted(path))
    allowed = MAY_IMPORT.get(own, set()) | {own}
    wrong = [
        f"{where(path, line)} imports {found or 'phi3c'}; {own or 'phi3c'} may import "
        f"{', '.join(sorted(allowed - {own})) or 'nothing of phi3c'}"
        for line, found, _ in imported_units(path)
        if found not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_keeps_the_wings_apart():
    reached, todo = set(), ["runtime", "engine", "serve", "artifact"]
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += MAY_IMPORT[name] - reached
    assert not reached & COMPILE_WING


def test_the_table_has_no_circle():
    done: set[str] = set()
    left = dict(MAY_IMPORT)
    while ready := [name for name, needs in left.items() if needs - {name} <= done]:
        done |= set(ready)
        for name in ready:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if unit(dotted(p)) in ("", "arguments", "cli", "__main__")],
    ids=dotted,
)
def test_the_top_imports_lazily(path):
    """`phi3c --help` and `import phi3c` load neither TVM nor a model."""
    lazy = {"", "arguments", "errors", "cli"}
    eager = [
        f"{where(path, line)} imports {found} when it is imported itself"
        for line, found, at_import in imported_units(path)
        if at_import and found not in lazy and not under_type_checking(path, line)
    ]
    assert not eager, "\n".join(eager)


def under_type_checking(path: Path, line: int) -> bool:
    """Whether the line is in an `if TYPE_CHECKING:` block."""
    return any(
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
        and node.lineno <= line <= node.body[-1].end_lineno
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_relative_and_absolute_imports_are_both_read(tmp_path, monkeypatch):
    """The reader itself, on a module that imports in every form."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "phi3c")
    path = tmp_path / "phi3c" / "runtime" / "odd.py"
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").touch()
    (tmp_path / "phi3c" / "model").mkdir()
    (tmp_path / "phi3c" / "model" / "__init__.py").touch()
    path.write_text(
        "import phi3c.model.phi3\n"
        "from ..model import phi3\n"
        "from .. import model\n"
        "from phi3c import model\n"
        "from . import host\n"
        "from phi3c import load\n"
        "def f():\n"
        "    from ..model.phi3 import Phi3Model\n"
        "import numpy\n"
    )
    found = list(imported_units(path))
    assert [line for line, name, _ in found if name == "model"] == [1, 2, 3, 4, 8]
    assert [line for line, name, _ in found if name == "runtime"] == [5]
    assert [line for line, name, _ in found if name == ""] == [6]
    assert [line for line, _, at_import in found if not at_import] == [8]
