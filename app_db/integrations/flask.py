"""Flask: an extension that gives each request a unit of work.

>>> from flask import Flask
>>> from app_db import Container
>>> from app_db.integrations.flask import AppDb
>>> container = Container()
>>> app = Flask(__name__)
>>> AppDb(container).init_app(app)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from flask import Flask, Response, request

from app_db import DatabaseContainer, DeferredUnit
from app_db.integrations._rule import CommitRule, commit_rule
from app_db.integrations.wsgi import UNIT, UnitOfWorkMiddleware

__all__ = ["AppDb"]

_log = logging.getLogger("app_db")


class AppDb:
    """Gives each request of a Flask application a unit of work. It begins when a session is first asked for.

    It ends after all functions of `after_request`, and before the response begins. A response below 400 commits, so `abort(409)`
    aborts. If the commit fails, the handler for 500 or `Exception` gets the error. The options are those of
    `app_db.integrations.wsgi.UnitOfWorkMiddleware`.
    """

    def __init__(
        self,
        container: DatabaseContainer,
        app: Flask | None = None,
        *,
        read_only_methods: Iterable[str] = (),
        rule: CommitRule = commit_rule,
        isolation: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.container = container
        self._rule = rule
        self._options: dict[str, Any] = {
            "read_only_methods": tuple(read_only_methods), "rule": rule, "isolation": isolation, "timeout": timeout
        }  # fmt: skip
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Install it in an application. `app.extensions["app_db"]` is this object then."""
        app.extensions["app_db"] = self
        app.wsgi_app = UnitOfWorkMiddleware(app.wsgi_app, self.container, **self._options)  # type: ignore[method-assign]
        app.after_request_funcs.setdefault(None, []).insert(0, self._end_unit)  # the first one is called last

    def _end_unit(self, response: Response) -> Response:
        unit: DeferredUnit | None = request.environ.get(UNIT)
        if unit is None or unit.is_over:
            return response
        headers = {name.lower(): value for name, value in response.headers.items()}
        try:
            unit.end(commit=not unit.is_doomed and self._rule(response.status_code, headers, None))
        except Exception:
            if not unit.has_committed:
                unit.renew()  # an error handler may ask for a session
                raise
            _log.exception("A request has committed, and then something failed")
        return response
