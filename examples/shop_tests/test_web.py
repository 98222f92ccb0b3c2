"""The shop's web service, asked as a browser would ask it. Its coroutines commit, and nothing is left either."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from shop.web import app

pytestmark = pytest.mark.app_db


def ask(work: Any) -> None:
    """Run a coroutine function with a client of the service, in a loop of its own."""

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://shop") as client:
            await work(client)

    asyncio.run(main())


def order(client: httpx.AsyncClient, customer: str, quantity: int = 1) -> Coroutine[Any, Any, httpx.Response]:
    return client.post("/orders", json={"customer": customer, "sku": "tea", "quantity": quantity})


def test_an_order_is_taken_or_refused(letters: list[tuple[str, str]]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/deliveries", json={"sku": "tea", "quantity": 3})
        taken, refused = await order(client, "Ann", 2), await order(client, "Bob", 2)
        assert (taken.status_code, refused.status_code) == (201, 409)
        assert (await client.get("/stock/tea")).json() == {"quantity": 1}
        assert letters == [("Ann", f"Your order {taken.json()['order']}: 2 tea.")]

    ask(work)


def test_customers_who_come_at_once_get_no_more_than_there_is() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/deliveries", json={"sku": "tea", "quantity": 5})
        answers = await asyncio.gather(*(order(client, f"customer {number}") for number in range(8)))
        assert sorted(answer.status_code for answer in answers) == [201] * 5 + [409] * 3
        assert (await client.get("/stock/tea")).json() == {"quantity": 0}

    ask(work)


def test_the_service_runs_in_another_thread() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        await client.post("/deliveries", json={"sku": "tea", "quantity": 2})
        assert (await client.get("/stock/tea")).json() == {"quantity": 2}

    with ThreadPoolExecutor(1) as pool:
        pool.submit(ask, work).result()


@pytest.mark.parametrize("attempt", range(3))
def test_each_test_begins_with_nothing(attempt: int) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.get("/stock/tea")).json() == {"quantity": 0}
        await client.post("/deliveries", json={"sku": "tea", "quantity": 1})

    ask(work)
