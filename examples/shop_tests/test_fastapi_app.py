"""The FastAPI application, asked by FastAPI's test client. Its requests commit, and nothing is left."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from shop.fastapi_app import app
from shop.models import Movement
from shop.services import ordered, receive, stock

pytestmark = pytest.mark.app_db

client = TestClient(app)  # without `with`, which would run the lifespan: the container is the test's


def order(customer: str = "Ann", **changed: Any) -> httpx.Response:
    response: httpx.Response = client.post("/orders", json={"customer": customer, "sku": "tea", "quantity": 1, **changed})
    return response


def test_an_order_is_taken_or_refused(letters: list[tuple[str, str]]) -> None:
    assert client.post("/deliveries", json={"sku": "tea", "quantity": 3}).json() == {"quantity": 3}
    taken, refused = order("Ann", quantity=2), order("Bob", quantity=2)
    assert (taken.status_code, refused.status_code) == (201, 409)
    assert refused.json() == {"detail": "There is not enough tea in the warehouse."}
    assert (stock("tea"), ordered("tea")) == (1, 2)
    assert letters == [("Ann", f"Your order {taken.json()['order']}: 2 tea.")]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"quantity": 0}, "greater than or equal to 1"),
        ({"quantity": "two"}, "valid integer"),
        ({"customer": ""}, "at least 1 character"),
        ({"sku": "moon dust"}, "does not sell moon dust"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(changed: dict[str, Any], why: str) -> None:
    receive("tea", 3)
    refused = order(**changed)
    assert refused.status_code == 422
    assert why in refused.text
    assert (stock("tea"), ordered("tea")) == (3, 0)


def test_customers_who_come_at_once_get_no_more_than_there_is() -> None:
    receive("tea", 5)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(order, (f"customer {number}" for number in range(8))))
    assert sorted(answer.status_code for answer in answers) == [201] * 5 + [409] * 3
    assert (stock("tea"), ordered("tea")) == (0, 5)


def test_the_stock_is_read_by_a_coroutine(app_db_isolation: Any) -> None:
    async def main() -> None:
        async with app_db_isolation.async_session("warehouse") as warehouse:
            warehouse.add_all(Movement(sku=sku, quantity=quantity) for sku, quantity in (("tea", 3), ("honey", 1), ("tea", -1)))
            await warehouse.commit()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://shop") as client:
            assert (await client.get("/stock")).json() == {"honey": 1, "tea": 2}

    asyncio.run(main())


def test_the_page_is_there() -> None:
    assert "<title>Shop</title>" in client.get("/").text


@pytest.mark.parametrize("attempt", range(2))
def test_each_test_begins_with_nothing(attempt: int) -> None:
    assert (stock("tea"), ordered("tea")) == (0, 0)
    client.post("/deliveries", json={"sku": "tea", "quantity": 2})
    assert order("Ann").status_code == 201
