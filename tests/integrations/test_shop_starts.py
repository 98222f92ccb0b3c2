"""The example's applications start by one command, say in one error what is missing, and have a page that a browser can use."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from harness.brokers import RedisServer
from harness.paths import PYTHONPATH, ROOT
from harness.requiring import need
from harness.servers import free_port
from harness.webs import client, post
from harness.workers import Worker, working

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EXAMPLES = ROOT / "examples"
ONE_FILE = (EXAMPLES / "one-file.env").read_text()
PATHS = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), PYTHONPATH])}
NOWHERE = "127.0.0.1:1"
WEB = ("fastapi", "flask", "pyramid")


def until(condition: Callable[[], object], worker: Worker) -> None:
    """Wait until something is so, or a process has ended."""
    give_up = time.monotonic() + 30
    while not condition():
        assert worker.process.poll() is None, "it has ended"
        assert time.monotonic() < give_up, "it took too long"
        time.sleep(0.02)


@contextmanager
def opened(application: str, directory: Path, **settings: str) -> Iterator[httpx.Client]:
    """Start a web application in a directory, as the README says, and wait until it answers."""
    need(application if application != "fastapi" else "uvicorn", "waitress")
    port = str(free_port())
    settings = {**PATHS, "SHOP_PORT": port, **settings}
    log = directory / f"{application}.log"
    with working(["-m", "shop", application], settings, log) as worker, client(f"http://127.0.0.1:{port}") as asking:

        def answers() -> bool:
            try:
                return asking.get("/stock").status_code == 200
            except httpx.ConnectError:
                return False

        until(answers, worker)
        yield asking


def order(shop: httpx.Client, **changed: object) -> httpx.Response:
    return shop.post("/orders", json={"customer": "Ann", "sku": "tea", "quantity": 2, **changed})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / ".env").write_text(ONE_FILE)
    return tmp_path


@pytest.mark.exhaustive
@pytest.mark.parametrize("application", WEB)
def test_a_web_application_sells_what_there_is(application: str, directory: Path) -> None:
    with opened(application, directory) as shop:
        assert shop.post("/deliveries", json={"sku": "tea", "quantity": 3}).json() == {"quantity": 3}
        assert [order(shop).status_code, order(shop).status_code, order(shop, quantity=0).status_code] == [201, 409, 422]
        assert shop.get("/stock").json() == {"tea": 1}
    database = sqlite3.connect(directory / "shop.db")
    rows = [database.execute(f"SELECT quantity FROM {table} ORDER BY id").fetchall() for table in ("orders", "movements")]
    database.close()
    assert rows == [[(2,)], [(3,), (-2,)]]


@pytest.mark.exhaustive
def test_customers_who_come_at_once_get_no_more_than_there_is(directory: Path, new_postgres_url: Callable[[], str]) -> None:
    lines = [line for line in (EXAMPLES / "four-databases.env").read_text().splitlines() if line and line[0] != "#"]
    settings = dict(line.split("=", 1) for line in lines if "READER" not in line)
    settings |= {name: new_postgres_url() for name in settings if name.endswith("URL")}
    with opened("fastapi", directory, **settings) as shop, ThreadPoolExecutor(8) as pool:
        shop.post("/deliveries", json={"sku": "tea", "quantity": 5})

        def buy(number: int) -> int:
            wanted = {"customer": f"customer {number}", "sku": "tea", "quantity": 1}
            return post(f"{shop.base_url}/orders", json=wanted).status_code  # uvicorn closes connections after a 500

        answers = list(pool.map(buy, range(24)))
        assert set(answers) <= {201, 409, 500}  # 500: another customer was quicker, three times
        assert shop.get("/stock").json() == {"tea": 5 - answers.count(201)}
        assert 1 <= answers.count(201) <= 5


# ---- the page ---------------------------------------------------------------------------------------------------------


def stock_on(page: Page) -> dict[str, str]:
    """Return what the page shows, once the script has asked for it."""
    return {row.get_by_role("rowheader").inner_text(): row.get_by_role("cell").inner_text()
            for row in page.locator("tbody tr").all()}  # fmt: skip


def fill_in(page: Page, name: str, **fields: str) -> None:
    """Fill in a form as somebody does who only hears the labels, and send it."""
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name=name).click()


def test_the_page_shows_the_stock_takes_an_order_and_shows_a_refusal(browser: Browser, directory: Path) -> None:
    from playwright.sync_api import expect

    with opened("fastapi", directory) as shop:
        shop.post("/deliveries", json={"sku": "<b>tea</b>", "quantity": 3})
        page = browser.new_page()
        wrong: list[object] = []
        page.on("pageerror", lambda error: wrong.append(error))
        page.goto(str(shop.base_url))
        status = page.get_by_role("status")
        expect(page.get_by_role("cell", name="3", exact=True)).to_be_visible()
        assert stock_on(page) == {"<b>tea</b>": "3"}  # what customers write is text, and no HTML

        fill_in(page, "Deliver", Delivered_goods="honey", Delivered_quantity="5")
        expect(status).to_have_text("There are 5 honey now.")
        assert stock_on(page) == {"<b>tea</b>": "3", "honey": "5"}

        fill_in(page, "Order", Your_name="Ann", Goods="honey", Quantity="4")
        expect(status).to_have_text(re.compile("Thank you, Ann. Order 1: 4 honey."))
        assert stock_on(page) == {"<b>tea</b>": "3", "honey": "1"}

        fill_in(page, "Order", Quantity="2")
        expect(status).to_have_text("There is not enough honey in the warehouse.")
        fill_in(page, "Order", Goods="moon dust")
        expect(status).to_have_text("The shop does not sell moon dust.")
        fill_in(page, "Order", Goods="honey", Quantity="2000000")
        expect(status).to_have_text("quantity: Input should be less than or equal to 1000000")
        assert shop.get("/stock").json() == {"<b>tea</b>": 3, "honey": 1}

    fill_in(page, "Order", Quantity="1")
    expect(status).to_have_text("The shop does not answer. Try again later.")
    assert wrong == []


# ---- the worker -------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_the_letter_is_sent_by_a_worker_after_the_commit(directory: Path, broker: str, redis: RedisServer) -> None:
    need("celery")
    queued = {"SHOP_BROKER": broker}
    with opened("fastapi", directory, **queued) as shop:
        shop.post("/deliveries", json={"sku": "tea", "quantity": 3})
        assert [order(shop).status_code, order(shop).status_code] == [201, 409]
        assert redis.ask("LLEN", "celery") == b":1\r\n"  # only the order that was taken is confirmed
        log = directory / "worker.log"
        with working(["-m", "shop", "worker"], {**PATHS, **queued}, log) as worker:
            until(lambda: "A letter to Ann: Your order 1: 2 tea." in worker.said(), worker)
            until(lambda: redis.ask("HLEN", "unacked") == b":0\r\n", worker)  # it has committed before
            assert worker.stop() == 0
    database = sqlite3.connect(directory / "shop.db")
    lines = [text for (text,) in database.execute("SELECT text FROM entries WHERE text LIKE 'letter%'")]
    database.close()
    assert lines == ["letter to Ann: Your order 1: 2 tea."]


# ---- what is missing --------------------------------------------------------------------------------------------------


def refused(application: str, directory: Path, settings: Mapping[str, str]) -> str:
    """Start what can't start, and return the one error that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "shop", application],
        cwd=directory,
        env={**os.environ, **PATHS, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    return done.stderr


URL = "APP_DB_CONNECTIONS__WAREHOUSE__URL"
MISSING = {
    "driver": (
        "flask",
        {URL: "oracle+oracledb://shop@db/shop"},
        f"{URL}: needs a driver that is not installed: pip install oracledb",
    ),
    "driver's name": ("pyramid", {URL: "postgresql+pg8000://shop@db/shop"}, "needs the driver pg8000, which can't be imported"),
    "database": ("fastapi", {URL: f"postgresql://shop:secret@{NOWHERE}/shop"}, f"Start the database, or change {URL}"),
    "directory": ("flask", {URL: "sqlite:////nowhere/shop.db"}, f"Start the database, or change {URL}"),
    "broker": ("fastapi", {"SHOP_BROKER": f"redis://:secret@{NOWHERE}/0"}, "Start one, or change SHOP_BROKER"),
    "broker of the worker": ("worker", {"SHOP_BROKER": f"redis://:secret@{NOWHERE}/0"}, "There is no broker at redis://"),
    "kind of broker": ("worker", {"SHOP_BROKER": "redsi://localhost"}, "No such transport: redsi"),
    "setting of the broker": ("worker", {}, "SHOP_BROKER is not set"),
    "number": ("flask", {"SHOP_PORT": "eighty"}, "SHOP_PORT: Input should be a valid integer"),
    "misspelt": ("flask", {"APP_DB_ATOMICTY": "strict"}, "APP_DB_ATOMICTY: is set, but"),
    "application": ("django", {}, "Usage: python -m shop fastapi|flask|pyramid|worker"),
}


@pytest.mark.representative("setting of the broker")
@pytest.mark.parametrize("missing", MISSING)
def test_what_is_missing_is_one_clear_error(missing: str, directory: Path) -> None:
    application, settings, said = MISSING[missing]
    assert said in refused(application, directory, settings)


@pytest.mark.exhaustive
def test_settings_that_are_missing_are_one_clear_error(tmp_path: Path) -> None:
    assert "APP_DB_CONNECTIONS__WRITER__URL: is not set" in refused("fastapi", tmp_path, {})
