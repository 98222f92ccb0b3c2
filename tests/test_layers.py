"""Dependencies between the rooms of app_db point downward, and the house stands on five libraries.

Every import counts: those inside functions, under TYPE_CHECKING and by importlib with a constant name too.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "app_db"
PLUGIN = ROOT / "pytest_app_db"

ROOMS = (
    ("_wording",),
    ("errors", "_compat"),
    ("_liveness",),
    ("settings",),
    ("_databases",),
    ("_two_phase",),
    ("_units",),
    ("models",),
    ("_sessions",),
    ("health", "asyncio"),
    ("container",),
    ("testing", "migrations", "logging"),
    ("_findings",),
    ("cli",),
    ("integrations", "__main__"),
)
"""The rooms from the bottom up. A room imports rooms below it, and none beside it."""

LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

CONTENTS = "app_db"
"""The root. It lists names up to the container, and only the rooms above that may read the list."""

TOP = LEVELS["container"]

NO_ROOMS = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}

FOUNDATIONS = {
    "dependency_injector": "a dependency",
    "pydantic": "comes with pydantic-settings, which takes its models and types",
    "pydantic_settings": "a dependency",
    "sqlalchemy": "a dependency",
    "transaction": "a dependency",
    "zope.interface": "comes with transaction, whose interfaces are written in it",
    "zope.sqlalchemy": "a dependency",
}

ON_DEMAND = {
    "aiosqlite": "an extra: asked for when a connection uses it",
    "anyio": "used where the application has it running",
    "asyncpg": "an extra: asked for when a connection uses it",
    "dotenv": "comes with pydantic-settings, which reads env files by it",
    "greenlet": "an extra: asked for by async code",
    "litestar": "an extra: asked for by its integration",
    "psycopg": "an extra: asked for when a connection uses it",
    "pymysql": "an extra: asked for when a connection uses it",
    "typing_extensions": "for type checkers only",
}
"""What may be imported inside a function, under TYPE_CHECKING or in a `try`, and never by importing app_db."""

ABOUT_ONE_DRIVER = {"_databases.drivers.begin_along": "psycopg"}
"""Modules that import a driver, and are themselves imported on demand, where that driver is used."""

EDGES = {"integrations", "testing", "migrations", "cli", "__main__"}
"""Rooms that meet a framework, a test runner, Alembic or a terminal: those may import it."""


@dataclass(frozen=True)
class Import:
    importer: str
    target: str
    line: int
    names: tuple[str, ...]
    on_demand: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(path: Path, package: Path = PACKAGE) -> str:
    if package not in path.parents:
        return path.stem
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    importer = module_name(path, package)
    parent = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    deferred = set(_deferred(tree))
    for node in ast.walk(tree):
        line, on_demand = getattr(node, "lineno", 0), id(node) in deferred
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, line, (), on_demand)
        elif isinstance(node, ast.ImportFrom):
            above = parent.rsplit(".", node.level - 1)[0] if node.level > 1 else parent
            base = ".".join(filter(None, [above if node.level else "", node.module]))
            names = tuple(alias.name for alias in node.names)
            modules = [name for name in names if _is_module(f"{base}.{name}", package)]
            for name in modules:
                yield Import(importer, f"{base}.{name}", line, (), on_demand)
            if len(modules) < len(names):
                yield Import(importer, base, line, tuple(name for name in names if name not in modules), on_demand)
        elif isinstance(node, ast.Call) and (name := _dynamic(node)):
            yield Import(importer, name if not name.startswith(".") else parent + name, line, (), on_demand)


def _deferred(tree: ast.AST) -> Iterator[int]:
    """The nodes that don't run when the module is imported, or may fail then."""
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or typing_only:
            yield from map(id, ast.walk(node))


def _dynamic(call: ast.Call) -> str:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    constant = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    return constant if function in {"import_module", "__import__"} and isinstance(constant, str) else ""


def _is_module(name: str, package: Path) -> bool:
    if name.partition(".")[0] != package.name:
        return False
    path = package.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or path.is_dir()


def room_of(module: str) -> str:
    """The room a module is in: its first name below the package, or the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else CONTENTS


def module_in_package(module: str) -> str:
    return module.partition(".")[2]


def wrong_way(found: Import) -> str:
    """What is wrong with an import of one room by another; empty if nothing is."""
    importer, target = room_of(found.importer), room_of(found.target)
    if importer == target:
        return ""
    if importer == CONTENTS:
        return "" if LEVELS[target] <= TOP else f"{found}: the root lists nothing of the rooms above the container"
    if target == CONTENTS:
        return "" if LEVELS[importer] > TOP else f"{found}: only the rooms above the container read the root"
    here, there = LEVELS[importer], LEVELS[target]
    if here > there:
        return ""
    return f"{found}: {'sideways' if here == there else 'upward'}, from {importer} to {target}"


def sources(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def all_imports() -> list[Import]:
    return [found for path in sources() for found in imports_of(path)]


def inner_imports() -> list[Import]:
    return [found for found in all_imports() if found.target.partition(".")[0] == PACKAGE.name]


def test_every_room_has_its_level() -> None:
    rooms = {room_of(module_name(path)) for path in sources()} - {CONTENTS}
    assert rooms <= set(LEVELS), "a new room needs a place in this file, and a line in the design"


def test_the_package_fits_on_a_page() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    assert len(entries) <= 21


def test_no_arrow_goes_up_or_sideways() -> None:
    known = [found for found in inner_imports() if {room_of(found.importer), room_of(found.target)} <= {*LEVELS, CONTENTS}]
    assert [problem for found in known if (problem := wrong_way(found))] == []


def test_no_import_goes_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for found in inner_imports():
        # A package runs its __init__ before its modules; that is no arrow anybody has drawn.
        if found.target != found.importer and not found.importer.startswith(found.target + "."):
            arrows.setdefault(found.importer, set()).add(found.target)
    assert circle_in(arrows) == []


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """The first circle found, as the names on it; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if circle := visit(target, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(arrows) if (circle := visit(name, []))), [])


def test_no_room_is_a_lumber_room() -> None:
    assert [path for path in PACKAGE.rglob("*") if path.stem.strip("_") in NO_ROOMS] == []


def test_the_core_stands_on_its_five_dependencies_and_the_standard_library() -> None:
    strangers = []
    for found in all_imports():
        top = found.target.partition(".")[0]
        name = ".".join(found.target.split(".")[:2]) if top == "zope" else top
        known = top in sys.stdlib_module_names or top == PACKAGE.name or name in FOUNDATIONS
        room, module = room_of(found.importer), module_in_package(found.importer)
        if not known and not (found.on_demand and top in ON_DEMAND) and room not in EDGES and ABOUT_ONE_DRIVER.get(module) != top:
            strangers.append(str(found))
    assert strangers == []


def test_what_is_about_one_driver_is_imported_on_demand() -> None:
    found = [found for found in inner_imports() if module_in_package(found.target) in ABOUT_ONE_DRIVER]
    assert {module_in_package(found.target) for found in found} == set(ABOUT_ONE_DRIVER)
    assert [str(eager) for eager in found if not eager.on_demand] == []


def test_the_root_imports_nothing_but_app_db() -> None:
    known = ("__future__", "typing")  # the second hides `__getattr__` from type checkers
    root = [found for found in all_imports() if found.importer == CONTENTS and found.target not in known]
    assert [str(found) for found in root if found.target.partition(".")[0] != PACKAGE.name] == []


def test_integrations_use_public_names_only() -> None:
    private = [
        f"{found}: {name}"
        for found in inner_imports()
        if room_of(found.importer) == "integrations" and room_of(found.target) not in ("integrations", "_compat")
        for name in (*found.target.split("."), *found.names)
        if name.startswith("_")
    ]
    assert private == []


def test_the_plugin_of_pytest_stands_beside_the_package_and_uses_public_names_on_demand() -> None:
    known = {*sys.stdlib_module_names, "pytest", PLUGIN.name}
    imports = [found for module in PLUGIN.glob("*.py") for found in imports_of(module)]
    found = [found for found in imports if found.target.partition(".")[0] not in known]
    assert [str(eager) for eager in found if not eager.on_demand] == []
    assert {found.target.partition(".")[0] for found in found} == {"app_db", "sqlalchemy"}
    names = {(found.target, name) for found in found if found.target.startswith(PACKAGE.name) for name in found.names}
    public = {module: import_module(module) for module in ("app_db", "app_db.errors", "app_db.testing")}
    assert [f"{module}.{name}" for module, name in sorted(names) if name not in _listed(public[module])] == []


def _listed(module: ModuleType) -> list[str]:
    listed: list[str] = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return listed


# ---- the check itself can fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importer", "source", "problem"),
    [
        ("errors", "from app_db.settings import DatabaseSettings", "upward, from errors to settings"),
        ("_databases.engines", "def f():\n    from ..container import DatabaseContainer", "upward, from _databases to container"),
        ("_databases.engines", "if TYPE_CHECKING:\n    from app_db import _units", "upward, from _databases to _units"),
        ("_databases.engines", "importlib.import_module('app_db._two_phase.recovery')", "upward, from _databases to _two_phase"),
        ("_compat.os", "import app_db.errors", "sideways, from _compat to errors"),
        ("testing._isolation", "from .. import migrations", "sideways, from testing to migrations"),
        ("container", "from app_db import Connection", "only the rooms above the container read the root"),
        ("__init__", "from app_db.cli import main", "the root lists nothing of the rooms above the container"),
        ("_databases.engines", "from ..settings import ConnectionSettings", ""),
        ("_units.units", "from app_db._units.coordinator import Coordinator", ""),
        ("cli.commands", "from app_db import DatabaseContainer", ""),
    ],
)
def test_a_wrong_arrow_is_noticed(tmp_path: Path, importer: str, source: str, problem: str) -> None:
    package = tmp_path / "app_db"
    for room in LEVELS:
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").touch()
    path = package / f"{importer.replace('.', '/')}.py"
    path.write_text(source)
    found = [
        problem for found in imports_of(path, package) if found.target.startswith("app_db") and (problem := wrong_way(found))
    ]
    assert (found != []) is bool(problem)
    assert all(problem in line for line in found)


def test_a_circle_is_noticed() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []


# ---- what is declared is what is meant ----------------------------------------------------------------------------------


def test_the_declared_dependencies_are_the_five() -> None:
    declared = {_distribution(line) for line in _project()["dependencies"]}
    assert declared == {"dependency-injector", "sqlalchemy", "zope-sqlalchemy", "transaction", "pydantic-settings"}


def test_the_lowest_versions_are_tested() -> None:
    """The pins of tox.ini's lowest environment are the lower bounds of pyproject.toml, extras included."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    pins = [line.partition("==") for line in tox["testenv:py311-lowest"]["deps"].split()]
    pinned = {_distribution(name): version for name, _, version in pins}
    assert {name: pinned.get(name) for name in _bounds()} == {name: lowest for name, (lowest, _) in _bounds().items()}


def test_no_minor_release_is_allowed_that_was_not_tested() -> None:
    """A library is capped at the minor release after the one that is installed here. The lowest ones say nothing about that."""
    for name, (lowest, cap) in _bounds().items():
        installed = _numbers(version(name))
        is_lowest = installed[: len(_numbers(lowest))] == _numbers(lowest)
        assert is_lowest or _numbers(cap)[:2] <= (installed[0], installed[1] + 1), f"{name} {version(name)} is tested, cap {cap}"


def test_the_newest_releases_are_allowed() -> None:
    """What is installed without pins is what the caps allow: nothing newer was left out."""
    allowed = [name for name, (lowest, cap) in _bounds().items() if _numbers(lowest) <= _numbers(version(name)) < _numbers(cap)]
    assert allowed == list(_bounds())


def _bounds() -> dict[str, tuple[str, str]]:
    """The lowest version of each library, and the first that is not allowed."""
    project = _project()
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = {}
    for line in lines:
        lowest, _, cap = line.partition(">=")[2].partition(",<")
        found[_distribution(line)] = (lowest, cap)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _project() -> dict[str, dict[str, list[str]]]:
    project: dict[str, dict[str, list[str]]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _distribution(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()
