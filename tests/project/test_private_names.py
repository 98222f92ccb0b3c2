"""Private names of other libraries stand in `app_db/_compat/` alone.

A name is private that begins with one underscore. It is another library's if nothing in app_db defines it: no function, class,
attribute of `self`, slot or variable of that name.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from harness.paths import ROOT

PACKAGE = ROOT / "app_db"
PLUGIN = ROOT / "pytest_app_db"
COMPAT = PACKAGE / "_compat"

PUBLIC_ALL_THE_SAME = {
    "_env_file": "pydantic-settings documents it",
    "_secrets_dir": "pydantic-settings documents it",
    "_fields": "collections documents it, of named tuples",
    "_fixtureinfo": "pytest's, in the plugin, which must not import app_db; tests/testing/test_pytest_plugin.py fails without it",
}

_LOOKUPS = {"getattr", "hasattr", "setattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and bool(name.strip("_"))


def own_names(trees: list[ast.Module]) -> set[str]:
    """The names that app_db defines."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            if node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Assign) and any(isinstance(it, ast.Name) and it.id == "__slots__" for it in node.targets):
            found |= {str(it.value) for it in ast.walk(node.value) if isinstance(it, ast.Constant)}
    return found


def private_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """The private names of others in a module: attributes, imports, and names that getattr and its like are given."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] != PACKAGE.name:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            own = own - {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".") if not alias.name.startswith(PACKAGE.name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _LOOKUPS and len(node.args) > 1:
            constant = node.args[1]
            names = [str(constant.value)] if isinstance(constant, ast.Constant) else []
        for name in names:
            if is_private(name) and name not in own and name not in PUBLIC_ALL_THE_SAME:
                yield getattr(node, "lineno", 0), name


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *PLUGIN.rglob("*.py")])


def test_private_names_of_others_stand_in_compat_alone() -> None:
    trees = {path: ast.parse(path.read_text(), str(path)) for path in sources()}
    outside = {path: tree for path, tree in trees.items() if COMPAT not in path.parents}
    own = own_names(list(outside.values()))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}" for path, tree in outside.items() for line, name in private_names(tree, own)
    ]
    assert found == []


def test_what_app_db_overrides_of_others_is_public() -> None:
    """A private method that app_db defines, and a base class of another library has too, replaces that one's."""
    found = []
    for path in sources():
        if COMPAT in path.parents or PLUGIN in path.parents or path.name == "__main__.py":
            continue
        if path.name == "env.py":
            continue  # a program that Alembic runs
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found += [f"{name}.{attribute} replaces that of {owner}" for attribute, owner in replaced(value)]
    assert found == []


SET_BY_THE_INTERPRETER = {"_abc_impl", "_is_protocol", "_is_runtime_protocol"}
"""By `abc` and `typing`, in every class that derives from one of theirs."""


def replaced(kind: type) -> Iterator[tuple[str, str]]:
    """The private attributes by which a class replaces another library's, and the class that has them there."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in {PACKAGE.name, *sys.stdlib_module_names}]
    for attribute, value in vars(kind).items():
        name = getattr(getattr(value, "__func__", value), "__qualname__", f"{kind.__qualname__}.")
        if not name.startswith(f"{kind.__qualname__}."):
            continue  # not written in the class: set by a function of _compat
        owner = next((base for base in bases if attribute in vars(base)), None)
        if is_private(attribute) and attribute not in SET_BY_THE_INTERPRETER and owner is not None:
            yield attribute, f"{owner.__module__}.{owner.__name__}"


def test_only_compat_uses_its_own_kind_of_names() -> None:
    """No module of _compat imports another room: each can be read, and replaced, by itself."""
    for path in COMPAT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("app_db"):
                assert (node.module or "").startswith("app_db._compat"), path


@pytest.mark.parametrize(
    "source",
    [
        "connection._sock",
        "from psycopg._preparing import Prepare",
        "from sqlalchemy.orm.session import _sessions",
        "import psycopg._preparing",
        "getattr(connection, '_sock', None)",
        "setattr(connection, '_sock', None)",
    ],
)
def test_a_private_name_is_noticed(source: str) -> None:
    assert list(private_names(ast.parse(source), own=set()))


def test_names_of_our_own_are_no_private_names_of_others() -> None:
    tree = ast.parse("class A:\n    def __init__(self, other):\n        self._mine = other._mine\n    def _go(self): self._go()")
    assert list(private_names(tree, own_names([tree]))) == []
