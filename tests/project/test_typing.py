"""mypy --strict and pyright's strict mode accept app_db and the code of its users, and find what is wrong in the latter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.paths import ROOT

USER_CODE = Path(__file__).parent / "typing"
ACCEPTED = sorted(USER_CODE.glob("*.py"))
REFUSED = USER_CODE / "refused.txt"

pytestmark = pytest.mark.timeout(300)

Finding = tuple[str, int, str]
"""File, line, and what the checker says."""


def _run(checker: str, *arguments: object) -> str:
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    command = [sys.executable, "-m", checker, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2 and more: the checker itself failed
    return done.stdout


def mypy(*paths: Path) -> list[Finding]:
    """The project's configuration, which says strict, is read from pyproject.toml."""
    output = _run("mypy", "--no-error-summary", "--hide-error-context", "--show-absolute-path", "--no-pretty", *paths)
    lines = (re.fullmatch(r"(.+?):(\d+)(?::\d+)?: (error|warning): (.*)", line) for line in output.splitlines())
    return [(Path(found[1]).name, int(found[2]), found[4]) for found in lines if found is not None]


def pyright(*paths: Path) -> list[Finding]:
    """The project's configuration, which says strict, is read from pyproject.toml."""
    report = json.loads(
        _run("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", ROOT / "pyproject.toml", *paths)
    )
    assert report["summary"]["filesAnalyzed"] >= len(paths)
    return [
        (Path(found["file"]).name, found["range"]["start"]["line"] + 1, found["message"])
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]


CHECKERS = {"mypy": mypy, "pyright": pyright}


def marked_lines(lines: Iterable[str], checker: str) -> set[int]:
    return {number for number, line in enumerate(lines, 1) if line.endswith(("# ERROR", f"# ERROR of {checker}"))}


def test_the_projects_configuration_is_strict() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["strict"] is True
    assert tools["pyright"]["typeCheckingMode"] == "strict"


@pytest.fixture(scope="module", params=CHECKERS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    """What a checker finds in the package, and in right and wrong code of users: to start it takes longer than to check."""
    directory = tmp_path_factory.mktemp("typing")
    refused, changed = directory / "refused.py", directory / "changed.py"
    refused.write_text(REFUSED.read_text())
    changed.write_text(_changed(ACCEPTED[0].read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(ROOT))
        return CHECKERS[request.param](ROOT / "app_db", *ACCEPTED, refused, changed)


def _changed(source: str) -> str:
    """Code whose author is mistaken about types."""
    wrong = source.replace("container.writer.session(), Session)", "container.writer.session(), Engine)")
    return wrong.replace('assert_type(place_order("A-1"), Order)', 'assert_type(place_order("A-1"), str)')


@pytest.mark.exhaustive
def test_the_package_and_the_code_of_its_users_are_accepted(found: list[Finding]) -> None:
    assert [finding for finding in found if finding[0] not in ("refused.py", "changed.py")] == []


def test_the_code_of_users_needs_no_ignores() -> None:
    assert ACCEPTED
    for path in ACCEPTED:
        source = path.read_text()
        assert "ignore" not in source.partition('"""\n')[2], path
        assert source.count("assert_type(") > 20, path


@pytest.mark.exhaustive
def test_wrong_code_is_refused_line_by_line(found: list[Finding], request: pytest.FixtureRequest) -> None:
    checker = request.node.callspec.params["found"]
    lines = {line for file, line, _ in found if file == "refused.py"}
    assert lines == marked_lines(REFUSED.read_text().splitlines(), checker)


@pytest.mark.exhaustive
def test_what_the_code_of_users_asserts_about_types_is_checked(found: list[Finding]) -> None:
    """A checker that knew nothing of app_db would accept everything."""
    source = ACCEPTED[0].read_text()
    before, after = source.splitlines(), _changed(source).splitlines()
    differing = {number for number, (old, new) in enumerate(zip(before, after, strict=True), 1) if old != new}
    assert differing
    assert {line for file, line, _ in found if file == "changed.py"} == differing
