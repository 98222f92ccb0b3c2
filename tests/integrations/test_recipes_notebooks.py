"""docs/how-to/notebooks.md, in a real kernel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nbclient import NotebookClient

from harness.paths import PYTHONPATH
from harness.recipes import Recipe

nbformat: Any = pytest.importorskip("nbformat.v4")  # its functions have no types

NewUrl = Callable[[], str]

pytestmark = pytest.mark.exhaustive  # to start a kernel takes two seconds. Most of the page runs with the other pages, too

LEFT = """
from app_db.errors import NoUnitOfWork
try:
    container.unit()
except NoUnitOfWork as error:
    print(type(error).__name__, container.writer.engine().pool.checkedout())
"""


class Kernel:
    """A kernel in the working directory. It runs cells, and tells what each prints or raises."""

    def __init__(self, client: NotebookClient) -> None:
        self._client = client

    def run(self, *cells: str) -> list[str]:
        return [self._run(cell) for cell in cells]

    def _run(self, source: str) -> str:
        cell = nbformat.new_code_cell(source)
        self._client.nb.cells.append(cell)
        self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        return "".join(_said(output) for output in cell.outputs).strip()


def _said(output: Any) -> str:
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return str(output.text if output.output_type == "stream" else output.data["text/plain"])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernel]:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PYTHONPATH}")
    with _started(tmp_path) as client:
        yield Kernel(client)


@contextmanager
def _started(place: Path) -> Iterator[NotebookClient]:
    client = NotebookClient(nbformat.new_notebook(), allow_errors=True, timeout=60, resources={"metadata": {"path": str(place)}})
    with client.setup_kernel():
        yield client


def test_the_pages_cells_commit_and_can_be_run_again(kernel: Kernel, new_postgres_url: NewUrl) -> None:
    recipe = Recipe("notebooks", new_postgres_url())
    settings, definitions, sync, awaited = recipe.cells
    assert kernel.run(settings, definitions, sync, awaited) == [""] * 4
    assert recipe.skus() == ["A-1", "A-2"]
    assert kernel.run("sorted(order.sku for order in orders)") == ["['A-1', 'A-2', 'taken']"]

    again = [sync.replace("A-1", "A-3"), awaited.replace("A-2", "A-4")]
    assert kernel.run("container.shutdown_resources()", definitions, *again)[1:] == ["", "", ""]
    assert recipe.skus() == ["A-1", "A-2", "A-3", "A-4"]
    assert recipe.in_use(in_this_process=False) == 0


def test_a_cell_that_fails_leaves_no_unit_open(kernel: Kernel, new_postgres_url: NewUrl) -> None:
    recipe = Recipe("notebooks", new_postgres_url())
    settings, definitions, sync, awaited = recipe.cells
    kernel.run(settings, definitions)
    awaited = awaited.partition("\n\n")[0] + "\n"
    for cell, flush, sleep, interrupted in [
        (sync, "container.writer.session().flush()", "time.sleep(10)", "KeyboardInterrupt"),
        (awaited, "await container.writer.async_session().flush()", "await asyncio.sleep(10)", "CancelledError"),
    ]:
        for more, error in [
            ("raise RuntimeError('boom')", "RuntimeError: boom"),
            (f"import asyncio, os, signal, time; os.kill(os.getpid(), signal.SIGINT); {sleep}", interrupted),
            ("nonsense", "NameError: name 'nonsense' is not defined"),
        ]:
            said, left = kernel.run(f"{cell}    {flush}\n    {more}", LEFT)
            assert error in said
            assert (more, left) == (more, "NoUnitOfWork 0")
            assert (more, recipe.skus(), recipe.in_use(in_this_process=False)) == (more, [], 0)
        (said,) = kernel.run(cell.replace("A-1", "TAKEN").replace("A-2", "TAKEN"))
        assert said.startswith("IntegrityError")
        assert kernel.run(LEFT) == ["NoUnitOfWork 0"]
    kernel.run(sync, awaited)
    assert recipe.skus() == ["A-1", "A-2"]


def test_a_model_whose_base_stands_in_another_cell_cannot_be_defined_again(kernel: Kernel, new_postgres_url: NewUrl) -> None:
    recipe = Recipe("notebooks", new_postgres_url())
    settings, definitions, *_ = recipe.cells
    kernel.run(settings, definitions)
    model = definitions[definitions.index("class Order") : definitions.index("container =")]
    (said,) = kernel.run(model)
    assert "Table 'orders' is already defined" in said


WORK = """
from sqlalchemy.orm import Session
from app_db import Container, Provide, transactional
from shop import Order, container

@transactional
def injected(sku: str, session: Session = Provide[Container.writer.session]) -> None:
    session.add(Order(sku=sku + " first"))

def asking(sku: str) -> None:
    with container.transaction():
        container.writer.session().add(Order(sku=sku + " first"))

container.wire(modules=[__name__])
"""


def test_autoreload_needs_another_wiring(kernel: Kernel, new_postgres_url: NewUrl, tmp_path: Path) -> None:
    recipe = Recipe("notebooks", new_postgres_url())
    (tmp_path / "shop.py").write_text("\n".join(recipe.cells[:2]))
    module = tmp_path / "work.py"
    module.write_text(WORK)
    kernel.run("%load_ext autoreload\n%autoreload 2", "import work\nfrom work import injected, asking")
    assert kernel.run("injected('A')", "asking('B')") == ["", ""]

    module.write_text(WORK.replace("first", "second"))
    os.utime(module, (time.time() + 10, time.time() + 10))  # the clock of files is too coarse for autoreload
    said, *others = kernel.run("injected('C')", "asking('D')", "work.container.wire(modules=[work])", "injected('E')")
    assert said.startswith("NotWired")
    assert others == ["", "", ""]
    assert recipe.skus() == ["A first", "B first", "D second", "E second"]
