"""Flask: an extension that gives each request a unit of work.

>>> from flask import Flask
>>> from app_db import Container
>>> from app_db.integrations.flask import AppDb
>>> container = Container()
>>> app = Flask(__name__)
>>> AppDb(container).init_app(app)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Unpack

import click
from flask import Flask, Response, current_app, request
from flask.cli import with_appcontext

from app_db import DatabaseContainer
from app_db.integrations._requests import RequestOptions, RequestUnits
from app_db.integrations.wsgi import REPEATS, UnitOfWorkMiddleware, unit_of

__all__ = ["AppDb"]


class AppDb:
    """Gives each request of a Flask application a unit of work. It begins when a session is first asked for.

    It ends after all functions of `after_request` and the saving of Flask's session, and before the response begins. A response
    below 400 commits, so `abort(409)` aborts. If the commit fails, the handler for 500 or `Exception` gets the error. The options
    are those of `app_db.integrations.wsgi.UnitOfWorkMiddleware`. With `attempts`, error handlers get the error of the last
    attempt only. `flask app-db` is the command line of app_db for this container.
    """

    def __init__(self, container: DatabaseContainer, app: Flask | None = None, **options: Unpack[RequestOptions]) -> None:
        self.container = container
        self._options = options
        self._units = RequestUnits(container, awaited=False, **options)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Install it in an application. `app.extensions["app_db"]` is this object then."""
        app.extensions["app_db"] = self
        app.wsgi_app = UnitOfWorkMiddleware(app.wsgi_app, self.container, **self._options)  # type: ignore[method-assign]
        for name in ("handle_user_exception", "handle_exception"):
            setattr(app, name, _unless_repeated(getattr(app, name)))
        app.process_response = self._ending_unit(app.process_response)  # type: ignore[method-assign]
        app.cli.add_command(_command)

    def _ending_unit(self, process: Callable[..., Response]) -> Callable[..., Response]:
        """Return a method that calls all functions of `after_request`, saves the session of the browser, and ends the unit."""

        @wraps(process)
        def run(*args: Any, **kwargs: Any) -> Response:
            return self._end_unit(process(*args, **kwargs))

        return run

    def _end_unit(self, response: Response) -> Response:
        unit = unit_of(request.environ, self.container)
        if unit is None or unit.is_over:
            return response
        try:
            self._units.end(unit, response.status_code, response.headers.items())
        except Exception as error:
            if not request.environ[REPEATS](error):
                unit.renew()  # an error handler may ask for a session
            raise
        return response


def _unless_repeated(handle: Callable[[Exception], Any]) -> Callable[[Exception], Any]:
    """Return a method that handles errors, but raises those because of which the request is answered anew."""

    @wraps(handle)
    def run(e: Exception) -> Any:  # Flask's name for it
        repeats = request.environ.get(REPEATS)
        if repeats is not None and repeats(e):
            raise e
        return handle(e)

    return run


def _container() -> DatabaseContainer:
    extension: AppDb = current_app.extensions["app_db"]
    return extension.container


@click.command("app-db", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@with_appcontext
def _command(arguments: tuple[str, ...]) -> None:
    """Look after the application's databases."""
    from app_db.cli import main

    if not arguments:
        sys.exit(main(["--help"], program="flask app-db"))
    sys.exit(main(["--container", f"{__name__}:{_container.__name__}", *arguments], program="flask app-db"))
