"""The pages of the documentation: what blocks a page has, and a module in which they run.

tests/project/test_examples_in_docs.py runs all pages, and says what the comments above a block mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import linecache
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app_db.errors import AppDbError
from app_db.models import _bases as models

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
