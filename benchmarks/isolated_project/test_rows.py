"""One test, as often as TESTS says. It does nothing, or writes a row on each connection, and commits it."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import KIND, URLS, WAY

if WAY == "app_db":
    from shop import container, models

    def test_of_app_db(app_db_isolation: Any, number: int) -> None:
        if KIND == "writes":
            with container.transaction():
                for model in models:
                    container.session_of(model).add(model())

elif WAY == "recipe":
    from shop import models

    def test_by_the_recipe(sessions: Any, number: int) -> None:
        if KIND == "writes":
            for session, model in zip(sessions, models, strict=True):
                session.add(model())
                session.commit()

elif WAY == "django":
    from rows.models import Row

    @pytest.mark.django_db(databases="__all__")
    def test_of_django(number: int) -> None:
        if KIND == "writes":
            for place in range(len(URLS)):
                Row.objects.using("default" if place == 0 else f"shop{place}").create()

else:

    def test_without_a_database(number: int) -> None: ...
