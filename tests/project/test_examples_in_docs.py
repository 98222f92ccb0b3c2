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

import asyncio
import contextlib
import doctest
import importlib
import inspect
import io
import linecache
import os
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from app_db.errors import AppDbError
from app_db.models import _bases as models
from harness.paths import ROOT

PAGES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists() and "_build" not in path.parts
]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}|:{3,}) *(?P<info>[^`]*)$")
DIRECTIVE = re.compile(r"^\{code(-block)?\} *(?P<language>\S*)$")
SKIP = re.compile(r"^<!-- *not executed(?:: *(?P<reason>.*?))? *-->$")
OUTPUT = re.compile(r"^<!-- *output(?P<wrapped>, wrapped)? *-->$")
DATABASES = re.compile(r"^<!-- *databases: postgresql(?:, (?P<setting>\w+)=(?P<value>\w+))? *-->$", re.MULTILINE)
URL = re.compile(r"postgresql(\+psycopg)?://[^\s\"']+")


@dataclass(frozen=True)
class Block:
    language: str
    source: str
    line: int
    """Where the source begins, counted from 1."""
    comment: str
    """The last line above the block that isn't empty, if that is a comment."""


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, those inside directives that hold others (a note, a tab) among them."""
    lines = text.splitlines()
    position, comment = 0, ""
    around: list[str] = []
    while position < len(lines):
        line = lines[position]
        position += 1
        if around and line.strip() == around[-1]:
            around.pop()
            comment = ""
            continue
        opening = FENCE.match(line)
        if opening is None:
            stripped = line.strip()
            comment = stripped if stripped.startswith("<!--") else comment if not stripped else ""
            continue
        info, directive = opening["info"].strip(), DIRECTIVE.match(opening["info"].strip())
        if info.startswith("{") and directive is None and (len(opening["fence"]) > 3 or opening["fence"].startswith(":")):
            around.append(opening["fence"])
            comment = ""
            continue
        end = next((at for at in range(position, len(lines)) if lines[at].strip() == opening["fence"]), len(lines))
        body = [inner.removeprefix(opening["indent"]) for inner in lines[position:end]]
        options = len(body) - len(_without_options(body)) if directive else 0
        if directive or not info.startswith("{"):
            language = directive["language"] if directive else info
            yield Block(language, "\n".join(body[options:]) + "\n", position + options + 1, comment)
        position, comment = end + 1, ""


def _without_options(body: list[str]) -> list[str]:
    first = next((number for number, line in enumerate(body) if not line.startswith(":")), len(body))
    return body[first + 1 :] if first and first < len(body) and not body[first].strip() else body[first:]


def run(page: Path, module: types.ModuleType, new_url: Callable[[], str] | None = None) -> list[str]:
    """Execute a page's Python blocks, compare what they print with what the page says they print, and return it."""
    urls: dict[str, str] = {}
    printed: str | None = None
    outputs = []
    for block in blocks_of(page.read_text()):
        if block.language == "python":
            skip = SKIP.match(block.comment)
            if skip:
                assert skip["reason"], f"{page}:{block.line}: say why the example is not executed: <!-- not executed: REASON -->"
                printed = None
                continue
            printed = _execute(page, block if new_url is None else _at_home(block, urls, new_url), module)
            outputs.append(printed)
        elif output := OUTPUT.match(block.comment):
            assert printed is not None, f"{page}:{block.line}: no executed example comes before this output"
            same = printed.split() == block.source.split() if output["wrapped"] else printed == block.source
            assert same, f"{page}:{block.line}: the example prints something else:\n{printed}"
    return outputs


def _at_home(block: Block, urls: dict[str, str], new_url: Callable[[], str]) -> Block:
    """The block with URLs of real databases: the same one wherever the page has the same URL."""

    def real(found: re.Match[str]) -> str:
        if found.group() not in urls:
            urls[found.group()] = new_url()
        return urls[found.group()]

    return replace(block, source=URL.sub(real, block.source))


def _execute(page: Path, block: Block, module: types.ModuleType) -> str:
    # Padded, so that a traceback names the page's own line.
    code = compile("\n" * (block.line - 1) + block.source, str(page), "exec", dont_inherit=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, vars(module))
    return output.getvalue()


@contextlib.contextmanager
def module_of(page: Path) -> Iterator[types.ModuleType]:
    """A module for a page's examples; at its end the containers in it are shut down, as at the end of a program."""
    name = "page_" + re.sub(r"\W+", "_", page.stem.lower())
    module = types.ModuleType(name)
    module.__file__ = str(page)
    environment, known, metadata = dict(os.environ), set(sys.modules), dict(models._metadata)
    unreflected = set(models._unreflected)
    pages_at, AppDbError.pages_at = AppDbError.pages_at, ""  # as docs/errors/index.md says
    models._metadata.clear()  # each page is a process of its own, as far as it knows
    models._unreflected.clear()
    sys.modules[name] = module
    linecache.checkcache(str(page))
    try:
        yield module
    finally:
        for value in list(vars(module).values()):
            _shut_down(value)
        sys.modules.pop(name, None)
        for other in set(sys.modules) - known:
            if str(getattr(sys.modules[other], "__file__", "") or "").startswith(str(Path.cwd())):
                del sys.modules[other]
        os.environ.clear()
        os.environ.update(environment)
        models._metadata.clear()
        models._metadata.update(metadata)
        models._unreflected.clear()
        models._unreflected.update(unreflected)
        AppDbError.pages_at = pages_at


def _shut_down(value: Any) -> None:
    from dependency_injector.containers import Container

    if isinstance(value, Container):
        value.unwire()
        waiting = value.shutdown_resources()
        if inspect.isawaitable(waiting):
            asyncio.run(_finish(waiting))


async def _finish(waiting: Any) -> None:
    await waiting


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
