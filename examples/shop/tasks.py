"""The shop's Celery worker: `celery -A shop.tasks worker` starts it.

A task is a unit of work, as a request is. It commits before its message is acknowledged.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from app_db.integrations.celery import install
from shop import mail, services
from shop.container import container
from shop.opening import ShopSettings

app: Any = Celery("shop", broker=ShopSettings().broker)
app.conf.update(task_acks_late=True, task_ignore_result=True, broker_connection_retry_on_startup=True)
install(app, container, attempts=3)


@app.task
def send_letter(customer: str, text: str) -> None:
    """Send a letter, and write that to the log. The web application calls `delay` after the commit of an order."""
    services.note(f"letter to {customer}: {text}"[:200])
    mail.send(customer, text)


container.wire(modules=[services])
