"""The Pyramid application, asked by WebTest. Its requests commit, and nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
from shop.pyramid_app import main
from shop.services import ordered, receive, stock
from webtest import TestApp as Client

pytestmark = pytest.mark.app_db


@pytest.fixture(scope="module")
def client(app_db_tables: None) -> Client:
    return Client(main({}))


def order(client: Client, customer: str = "Ann", **changed: Any) -> Any:
    asked = {"customer": customer, "sku": "tea", "quantity": 1, **changed}
    return client.post_json("/orders", asked, expect_errors=True)


def test_an_order_is_taken_or_refused(client: Client, letters: list[tuple[str, str]]) -> None:
    assert client.post_json("/deliveries", {"sku": "tea", "quantity": 3}).json == {"quantity": 3}
    taken, refused = order(client, "Ann", quantity=2), order(client, "Bob", quantity=2)
    assert (taken.status_int, refused.status_int) == (201, 409)
    assert refused.json == {"detail": "There is not enough tea in the warehouse."}
    assert client.get("/stock").json == {"tea": 1}
    assert ordered("tea") == 2
    assert letters == [("Ann", f"Your order {taken.json['order']}: 2 tea.")]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"quantity": 0}, "greater than or equal to 1"),
        ({"quantity": "two"}, "valid integer"),
        ({"customer": ""}, "at least 1 character"),
        ({"sku": "moon dust"}, "does not sell moon dust"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(client: Client, changed: dict[str, Any], why: str) -> None:
    receive("tea", 3)
    refused = order(client, **changed)
    assert refused.status_int == 422
    assert why in refused.text
    assert (stock("tea"), ordered("tea")) == (3, 0)


@pytest.mark.parametrize("attempt", range(2))
def test_each_test_begins_with_nothing(client: Client, attempt: int) -> None:
    assert (stock("tea"), ordered("tea")) == (0, 0)
    client.post_json("/deliveries", {"sku": "tea", "quantity": 2})
    assert order(client, "Ann").status_int == 201
