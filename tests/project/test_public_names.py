"""`__all__` says exactly which names are public: in the root, and in every module that has one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import paths

PACKAGE = paths.ROOT / "app_db"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ROOT = Path("__init__.py")


def parse(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text(), str(path))


def listed(tree: ast.Module) -> list[str] | None:
    """The value of `__all__`, or None where there is none."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            names: list[str] = list(ast.literal_eval(node.value))
            return names
    return None


def defined(tree: ast.Module) -> Iterator[str]:
    """Public names a module makes itself."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def constants(tree: ast.Module) -> set[str]:
    """Names in capitals: the rooms of the package may share a constant without offering it to anybody else."""
    return {name for name in defined(tree) if name.isupper()}


def _for_checkers(tree: ast.Module) -> list[ast.stmt]:
    """What stands under TYPE_CHECKING in the root, which says by `__getattr__` where each name is."""
    found = [node for node in tree.body if isinstance(node, ast.If) and "_HOMES" in ast.unparse(tree)]
    return [inner for node in found for inner in node.body]


def imported(tree: ast.Module) -> Iterator[str]:
    """Public names a module takes from elsewhere, `from __future__` aside. The root imports when it is asked for a name."""
    for node in (*tree.body, *_for_checkers(tree)):
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            names = (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            yield from (name for name in names if not name.startswith("_"))


def test_the_root_lists_what_it_binds_in_order() -> None:
    tree = parse(ROOT)
    names = listed(tree)
    assert names is not None
    assert names == sorted({*imported(tree), *defined(tree)})


def test_the_root_finds_at_run_time_what_checkers_are_told() -> None:
    told = {
        alias.name: node.module
        for node in _for_checkers(parse(ROOT))
        if isinstance(node, ast.ImportFrom) and node.module != "app_db"
        for alias in node.names
    }
    import app_db

    assert told == {name: module for module, names in app_db._HOMES.items() for name in names.split()}
    assert {*app_db.__all__, "container", "settings"} <= {*dir(app_db)}
    with pytest.raises(AttributeError, match="module 'app_db' has no attribute 'nothing'"):
        _ = app_db.nothing  # type: ignore[attr-defined]


def test_the_root_fits_on_a_page() -> None:
    names = listed(parse(ROOT)) or []
    assert 12 <= len(names) <= 25, "the root is a table of contents: what only some need is imported from its module"


def test_every_public_module_lists_its_names() -> None:
    """A module is public if no part of its path begins with an underscore."""
    public = [path for path in MODULES if not any(part.startswith("_") and part != "__init__.py" for part in path.parts)]
    assert len(public) > 5
    assert [str(path) for path in public if listed(parse(path)) is None] == []


def test_the_root_exports_exist() -> None:
    import app_db

    assert [name for name in listed(parse(ROOT)) or [] if not hasattr(app_db, name)] == []


@pytest.mark.parametrize("path", [path for path in MODULES if path != ROOT], ids=str)
def test_a_modules_list_is_what_it_defines(path: Path) -> None:
    tree = parse(path)
    names = listed(tree)
    if names is None:
        return
    assert names == sorted(set(names))
    own, taken = set(defined(tree)), set(imported(tree))
    assert own - set(names) - constants(tree) == set(), "public by its name, but not listed"
    assert set(names) - own - taken == set(), "listed, but not there"
