"""The documentation is executed: what a page shows works.

The Python blocks of one page, or the examples of one docstring, run one after another in one module of their own, which is
registered so that `container.wire(modules=[__name__])` finds it, in an empty directory without any APP_DB_ variable. Three
comments, each on a line of its own directly above a page's block, mean something here:

    <!-- not executed: REASON -->   the Python block below is shown only
    <!-- output -->                 the text block below is exactly what the Python block before it has printed
    <!-- output, wrapped -->        the same word by word; where lines break is the page's choice

Two more stand anywhere on a page and are for all of it:

    <!-- databases: postgresql -->  a PostgreSQL URL in a Python block is that of an empty database on the tests' server
    <!-- databases: postgresql, SETTING=VALUE -->   the same on a server of the page's own, set up so
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.pages import DATABASES, module_of, run
from harness.paths import ROOT

PAGES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists() and "_build" not in path.parts
]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_a_pages_examples_work(page: Path, request: pytest.FixtureRequest) -> None:
    with contextlib.ExitStack() as stack:
        new_url = _new_url(page.read_text(), request, stack)
        outputs = run(page, stack.enter_context(module_of(page)), new_url)
    if page.parent.name == "errors" and outputs:
        assert any(outputs), "the page's example prints the error it is about, and here it printed nothing"


def _new_url(text: str, request: pytest.FixtureRequest, stack: contextlib.ExitStack) -> Callable[[], str] | None:
    wanted = DATABASES.search(text)
    if wanted is None:
        return None
    if wanted["setting"] is None:
        shared: Callable[[], str] = request.getfixturevalue("new_postgres_url")
        return shared
    server = request.getfixturevalue("new_postgres")(settings={wanted["setting"]: wanted["value"]})
    return lambda: server.url(stack.enter_context(server.lend_database()))


def _modules() -> list[str]:
    package = ROOT / "app_db"
    names = [found.name for found in pkgutil.walk_packages([str(package)], "app_db.")]
    return ["app_db", *(name for name in names if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", _modules())
def test_a_modules_docstring_examples_work(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "app_db":
            raise
        pytest.skip(f"{missing.name} is not installed")
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for docstring in doctest.DocTestFinder().find(module):
        with module_of(Path(docstring.name)) as own:
            docstring.globs = vars(own)
            runner.run(docstring, out=report.write, clear_globs=False)
    assert runner.failures == 0, report.getvalue()


# ---- the runner itself can fail --------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


def run_text(page: Path, text: str) -> types.ModuleType:
    page.write_text(text)
    with module_of(page) as module:
        run(page, module)
    return module


def test_blocks_of_a_page_share_one_importable_module(page: Path) -> None:
    first = "```python\nimport sys\nx = 1\n```\n"
    second = "```{code-block} python\n:caption: Later\n\nx += 1\nassert sys.modules[__name__].x == 2\n```\n"
    module = run_text(page, f"{first}Some words.\n\n{second}")
    assert module.x == 2
    assert module.__name__ not in sys.modules


def test_a_block_in_a_note_and_in_a_list_is_executed(page: Path) -> None:
    module = run_text(page, "````{note}\n```python\nx = 1\n```\n````\n- item\n\n  ```python\n  if x:\n      y = 2\n  ```\n")
    assert module.y == 2


def test_a_failure_names_the_line_of_the_page(page: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_text(page, "# Title\n\n```python\nx = 1\n1 / 0\n```\n")
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == (str(page), 5)


def test_output_is_compared(page: Path) -> None:
    run_text(page, "```python\nprint('yes')\n```\n\n<!-- output -->\n```text\nyes\n```\n")
    with pytest.raises(AssertionError, match="something else"):
        run_text(page, "```python\nprint('yes')\n```\n<!-- output -->\n```text\nno\n```\n")
    run_text(page, "```python\nprint('a b c')\n```\n<!-- output, wrapped -->\n```text\na b\nc\n```\n")
    with pytest.raises(AssertionError, match="something else"):
        run_text(page, "```python\nprint('a b c')\n```\n<!-- output -->\n```text\na b\nc\n```\n")


def test_other_languages_and_explained_exceptions_are_left_alone(page: Path) -> None:
    run_text(page, "```sh\nfalse\n```\n<!-- not executed: it would take an hour -->\n```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match="say why"):
        run_text(page, "<!-- not executed -->\n```python\n1 / 0\n```\n")


def test_a_postgresql_url_is_a_real_databases_where_the_page_says_so(page: Path) -> None:
    page.write_text("```python\nurls = ['postgresql://a@b/c', 'postgresql://a@b/d', 'postgresql://a@b/c', 'sqlite://']\n```\n")
    names = iter(["first", "second"])
    with module_of(page) as module:
        run(page, module, lambda: next(names))
        assert module.urls == ["first", "second", "first", "sqlite://"]
        run(page, module)
        assert module.urls[0] == "postgresql://a@b/c"
    assert DATABASES.search("# Title\n\n<!-- databases: postgresql -->\n")


def test_a_page_leaves_no_variable_behind(page: Path) -> None:
    run_text(page, "```python\nimport os\nos.environ['APP_DB_ATOMICITY'] = 'best_effort'\n```\n")
    assert "APP_DB_ATOMICITY" not in os.environ
