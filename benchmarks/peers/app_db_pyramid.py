"""app_db with Pyramid, with pyramid_tm and pyramid_retry: docs/web.md."""

from __future__ import annotations

import os
from typing import Any

from pyramid.config import Configurator
from pyramid.response import Response
from pyramid_routes import add_routes
from shared import SECOND_URL, URL, Item, SecondItem

from app_db import container_of

NOT_OFFERED: dict[str, str] = {}

os.environ.update(APP_DB_CONNECTIONS__WRITER__URL=URL, APP_DB_CONNECTIONS__SECOND__URL=SECOND_URL, APP_DB_TWO_PHASE="true")
os.environ["APP_DB_APPLICATION"] = "compare"


# endpoint begins
def place(request: Any) -> Response:
    request.dbsession.add(Item(name=request.params["name"]))
    return Response("{}", 201)
    # endpoint ends


def both(request: Any) -> Response:
    request.dbsession.add(Item(name=request.params["name"]))
    container.second_session().add(SecondItem(name=request.params["second"]))
    return Response("{}", 201)


# wiring begins
container = container_of("writer", "second")()
with Configurator(settings={"retry.attempts": 3}) as config:
    config.include("pyramid_retry")
    config.include("pyramid_tm")
    config.include("app_db.integrations.pyramid")
    config.set_app_db(container)
    # wiring ends
    add_routes(config, place, both)

app = config.make_wsgi_app()
