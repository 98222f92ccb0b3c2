"""The log filter that says which unit of work and which connection a record belongs to."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app_db import Container, DatabaseSettings
from app_db.errors import InvalidUse
from app_db.logging import UnitFilter

container: Container
nothing = object()


class Kept(logging.Handler):
    """Keeps what it would write: the unit, the connection and the message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((vars(record)["unit"], vars(record)["connection"], record.getMessage()))


@pytest.fixture(autouse=True)
def _made() -> Iterator[None]:
    """The container is the module's, because some tests name it."""
    global container
    container = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://", "echo": True}}))
    yield
    container.shutdown_resources()


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler = Kept()
    handler.addFilter(UnitFilter(container))
    logging.root.addHandler(handler)
    yield handler
    logging.root.removeHandler(handler)


def test_a_record_has_the_number_of_its_unit(kept: Kept) -> None:
    logging.getLogger("shop").warning("before")
    with container.transaction() as unit:
        number = str(unit.number)
        logging.getLogger("shop").warning("inside")
    logging.getLogger("shop").warning("after")
    assert kept.lines == [("-", "-", "before"), (number, "-", "inside"), ("-", "-", "after")]


def test_what_sqlalchemy_logs_has_its_connection(kept: Kept) -> None:
    with container.transaction() as unit:
        number = str(unit.number)
        container.writer_session().execute(text("SELECT 42"))
    assert (number, "writer", "SELECT 42") in kept.lines


def test_what_says_itself_what_it_is_about_is_believed(kept: Kept) -> None:
    logging.getLogger("shop").warning("held", extra={"unit": 7, "connection": "warehouse"})
    assert kept.lines == [("7", "warehouse", "held")]


def test_the_filters_of_two_containers_do_not_hinder_each_other(kept: Kept) -> None:
    other = Container(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
    record = logging.makeLogRecord({"name": "shop", "msg": "inside"})
    with container.transaction() as unit:
        UnitFilter(other).filter(record)
        UnitFilter(container).filter(record)
    assert vars(record)["unit"] == str(unit.number)


def test_tasks_have_their_own_units(kept: Kept) -> None:
    async def work(name: str) -> str:
        async with container.transaction() as unit:
            await asyncio.sleep(0)
            logging.getLogger("shop").warning(name)
            return str(unit.number)

    async def main() -> tuple[str, str]:
        return await asyncio.gather(work("one"), work("other"))

    one, other = asyncio.run(main())
    assert sorted(kept.lines, key=lambda line: line[2]) == [(one, "-", "one"), (other, "-", "other")]
    assert one != other


def test_a_configuration_may_name_the_container() -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"unit": {"()": "app_db.logging.UnitFilter", "container": f"{__name__}:container"}},
            "handlers": {"kept": {"class": f"{__name__}.Kept", "filters": ["unit"]}},
            "loggers": {"configured": {"handlers": ["kept"]}},
        }
    )
    logger = logging.getLogger("configured")
    with container.transaction() as unit:
        logger.warning("inside")
        number = str(unit.number)
    [handler] = logger.handlers
    assert isinstance(handler, Kept)
    assert handler.lines == [(number, "-", "inside")]
    logger.removeHandler(handler)


LOGS_FIRST = """
import logging
logging.getLogger("shop").warning("the databases are set up")
from app_db import Container, DatabaseSettings
container = Container(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": "sqlite://"}}))
"""


def test_a_module_may_log_before_it_has_made_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs_first.py").write_text(LOGS_FIRST)
    monkeypatch.syspath_prepend(tmp_path)
    handler = Kept()
    handler.addFilter(UnitFilter("logs_first:container"))
    logger = logging.getLogger("shop")
    logger.addHandler(handler)
    try:
        made = import_module("logs_first").container
        with made.transaction() as unit:
            logger.warning("inside")
            number = str(unit.number)
    finally:
        logger.removeHandler(handler)
        sys.modules.pop("logs_first", None)
    assert handler.lines == [("-", "-", "the databases are set up"), (number, "-", "inside")]


@pytest.mark.parametrize("wrong", [Container, None, 42])
def test_what_is_no_container_is_refused_before_anything_is_logged(wrong: Any) -> None:
    with pytest.raises(InvalidUse, match=r"is no database container\. Give an instance"):
        UnitFilter(wrong)


@pytest.mark.parametrize(
    "name", ["no_such_module_here:container", f"{__name__}:no_such_name", f"{__name__}:nothing", "app_db:Container"]
)
def test_a_container_that_can_not_be_found_is_told_once_and_no_log_call_fails(name: str) -> None:
    found = UnitFilter(name)
    record = logging.makeLogRecord({"name": "shop", "msg": "anything"})
    with pytest.warns(RuntimeWarning, match=f"UnitFilter can't find the container '{name}'") as warned:
        found.filter(record)
    assert len(warned) == 1
    assert found.filter(logging.makeLogRecord({"name": "shop", "msg": "anything else"}))
    assert vars(record)["unit"] == "-"


@pytest.mark.parametrize("name", ["", "shop.db", ":container", "shop.db:"])
def test_a_name_without_a_module_or_a_container_is_refused(name: str) -> None:
    with pytest.raises(InvalidUse, match=r"names no container\. Write it as module:name"):
        UnitFilter(name)
