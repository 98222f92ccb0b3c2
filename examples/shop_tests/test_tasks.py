"""The worker's task, run without a worker. It commits, and nothing is left."""

from __future__ import annotations

from typing import Any

import pytest
from dependency_injector import providers
from shop import mail
from shop.checkout import check_out
from shop.container import container
from shop.models import Entry
from shop.services import OutOfStockError, receive
from shop.tasks import send_letter
from sqlalchemy import select

pytestmark = pytest.mark.app_db


def send_at_once(customer: str, text: str) -> None:
    """Run the task where a worker would."""
    send_letter.apply((customer, text), throw=True)


def test_the_letter_is_sent_by_a_task_after_the_commit(app_db_isolation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "sent", [])
    receive("tea", 3)
    with container.post.override(providers.Object(send_at_once)):
        number = check_out("Ann", "tea", 2)
        with pytest.raises(OutOfStockError):
            check_out("Bob", "tea", 2)
    assert mail.sent == [("Ann", f"Your order {number}: 2 tea.")]
    with app_db_isolation.session("log") as log:
        assert log.scalars(select(Entry.text).where(Entry.text.like("letter%"))).all() == [
            f"letter to Ann: Your order {number}: 2 tea."
        ]
