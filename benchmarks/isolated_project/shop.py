"""A container with as many connections as there are URLs, each with a model of its own."""

from __future__ import annotations

import json
import os
from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from app_db import Connection, DatabaseContainer, DatabaseSettings, orm_base

URLS = json.loads(os.environ["URLS"])
NAMES = [f"shop{number}" for number in range(len(URLS))]


def _model(name: str) -> Any:
    body = {"__tablename__": "isolated_rows", "__annotations__": {"id": Mapped[int]}, "id": mapped_column(primary_key=True)}
    return type("Row", (orm_base(name),), body)


models = [_model(name) for name in NAMES]
Container: Any = type("Container", (DatabaseContainer,), {name: Connection() for name in NAMES})
container = Container(
    settings=DatabaseSettings(
        _env_file=None,
        atomicity="best_effort",
        connections={name: {"url": url} for name, url in zip(NAMES, URLS, strict=True)},
    )
)
