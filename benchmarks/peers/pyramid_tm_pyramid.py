"""pyramid_tm with zope.sqlalchemy and pyramid_retry.

https://docs.pylonsproject.org/projects/pyramid_tm/en/latest/ ("Transaction Usage", "Adding a Commit Veto Hook", "Retries") and
https://docs.pylonsproject.org/projects/pyramid-cookiecutter-starter/ for the session of a request. `twophase` is
zope.sqlalchemy's way to commit in several databases.
"""

from __future__ import annotations

from typing import Any

import zope.sqlalchemy
from pyramid.config import Configurator
from pyramid.response import Response
from pyramid_routes import add_routes
from shared import SECOND_URL, URL, Item, SecondItem
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

NOT_OFFERED: dict[str, str] = {}


# endpoint begins
def place(request: Any) -> Response:
    request.dbsession.add(Item(name=request.params["name"]))
    return Response("{}", 201)
    # endpoint ends


def both(request: Any) -> Response:
    request.dbsession.add(Item(name=request.params["name"]))
    request.second_session.add(SecondItem(name=request.params["second"]))
    return Response("{}", 201)


# wiring begins
maker = sessionmaker(create_engine(URL), twophase=True)
second_maker = sessionmaker(create_engine(SECOND_URL), twophase=True)  # for two databases


def new_session(request: Any) -> Session:
    session = maker()
    zope.sqlalchemy.register(session, transaction_manager=request.tm)
    return session


# wiring ends
def new_second_session(request: Any) -> Session:
    session = second_maker()
    zope.sqlalchemy.register(session, transaction_manager=request.tm)
    return session


# wiring begins

settings = {
    "tm.manager_hook": "pyramid_tm.explicit_manager",
    "tm.commit_veto": "pyramid_tm.default_commit_veto",
    "retry.attempts": 3,
}
with Configurator(settings=settings) as config:
    config.include("pyramid_retry")
    config.include("pyramid_tm")
    config.add_request_method(new_session, "dbsession", reify=True)
    config.add_request_method(new_second_session, "second_session", reify=True)  # for two databases
    # wiring ends
    add_routes(config, place, both)

app = config.make_wsgi_app()
