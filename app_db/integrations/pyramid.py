"""Pyramid: `config.include("app_db.integrations.pyramid")`.

The container comes from `config.set_app_db(container)`, or is made from the settings of the ini file, whose keys are
`app_db.connections.writer.url` and so on. With pyramid_tm, its transaction is the request's unit of work; without it a tween of
this module begins and ends the unit.

>>> from pyramid.config import Configurator
>>> with Configurator(settings={"app_db.connections.writer.url": "sqlite://"}) as config:
...     config.include("app_db.integrations.pyramid")
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyramid.events import ApplicationCreated
from pyramid.exceptions import NotFound
from pyramid.tweens import EXCVIEW

from app_db import ContextTransactionManager, DatabaseContainer, DatabaseSettings, UnitOfWork, container_of, retryable
from app_db.errors import InvalidUse
from app_db.integrations._containers import require_container
from app_db.integrations._requests import RequestUnits
from app_db.integrations._rule import commit_rule

try:
    from pyramid_retry import mark_error_retryable
except ImportError:  # it is optional
    mark_error_retryable = None

if TYPE_CHECKING:
    from pyramid.request import Request
    from pyramid.response import Response
    from sqlalchemy.orm import Session

__all__ = ["commit_veto", "includeme", "manager_of", "tween_factory"]

_KEY = "app_db.container"
_UNITS = "app_db.units"
_TWO_PHASE = "app_db.two_phase"
_PREFIX = "app_db."


def includeme(config: Any) -> None:
    """Give requests `unit`, `dbsession` and `session_of`, and have pyramid_tm use the container's transaction manager."""
    config.add_directive("set_app_db", _set_container)
    config.add_directive("enable_sql_two_phase_commit", _enable_two_phase)
    settings = config.get_settings()
    settings.setdefault("tm.manager_hook", manager_of)
    settings.setdefault("tm.commit_veto", commit_veto)
    config.add_request_method(_unit_of, "unit", property=True)
    config.add_request_method(_writer_of, "dbsession", property=True)
    config.add_request_method(_session_of, "session_of")
    config.add_tween(f"{__name__}.tween_factory", over=("pyramid_tm.tm_tween_factory", EXCVIEW))
    config.add_subscriber(_require_container, ApplicationCreated)


def _set_container(config: Any, container: DatabaseContainer) -> None:
    require_container(container)
    config.registry[_KEY] = container


def _enable_two_phase(config: Any, enable: bool = True) -> None:
    """Prepare all connections that are made from the ini file: pyramid_sqlalchemy's name for it."""
    config.registry[_TWO_PHASE] = config.get_settings()[f"{_PREFIX}two_phase"] = enable


def _require_container(event: Any) -> None:
    """Make the container from the settings of the ini file, unless there is one. Refuse what would have no effect."""
    registry = event.app.registry
    if _KEY in registry:
        if registry.get(_TWO_PHASE):
            raise InvalidUse(
                "config.enable_sql_two_phase_commit() prepares connections of the ini file, and the application gave a container",
                "Prepare the container's connections by its own settings: APP_DB_TWO_PHASE=true",
            )
    else:
        given = {key: value for key, value in registry.settings.items() if key.startswith(_PREFIX)}
        settings = DatabaseSettings.from_mapping(given)
        registry[_KEY] = container_of(*settings.connections)(settings=settings)


def _container_of(request: Request) -> DatabaseContainer:
    container: DatabaseContainer | None = request.registry.get(_KEY)
    if container is None:
        raise InvalidUse("There is no container", "Call config.make_wsgi_app(), or config.set_app_db(container) before")
    return container


def _unit_of(request: Request) -> UnitOfWork:
    return _container_of(request).unit()


def _writer_of(request: Request) -> Session:
    return _container_of(request).connection("writer").session()


def _session_of(request: Request, subject: object) -> Session:
    return _container_of(request).session_of(subject)


def manager_of(request: Request) -> Any:
    """Return the transaction manager of a request's container: pyramid_tm's `tm.manager_hook`."""
    return _container_of(request).transaction_manager()


def commit_veto(request: Request, response: Response) -> bool:
    """Return whether a response must not commit: pyramid_tm's `tm.commit_veto`. Its rule is `commit_rule`."""
    return not commit_rule(response.status_int, {name.lower(): value for name, value in response.headers.items()})


def tween_factory(handler: Callable[[Request], Response], registry: Any) -> Callable[[Request], Response]:
    """Return a tween that gives each request a unit of work, unless pyramid_tm does that with the container's manager.

    In both cases it marks the errors that pyramid_retry may repeat, also those that an exception view has answered.
    """

    def tween(request: Request) -> Response:
        try:
            response = handler(request) if _has_tm(request) else _in_unit(handler, request)
        except Exception as error:
            _mark(error)
            raise
        _mark(getattr(request, "exception", None))
        return response

    return tween


def _has_tm(request: Request) -> bool:
    """Return whether pyramid_tm begins the units of the container. In an application inside another, it may be the other's."""
    manager = getattr(request, "tm", None)
    if not (manager is None or isinstance(manager, ContextTransactionManager)):
        raise InvalidUse(
            f"pyramid_tm uses a {type(manager).__name__} that is not the container's, by its tm.manager_hook or tm.manager",
            "Remove that setting. A test that begins the transaction itself takes container.transaction_manager()",
        )
    return manager is _container_of(request).transaction_manager()


def _in_unit(handler: Callable[[Request], Response], request: Request) -> Response:
    units = _units_of(request)
    unit = units.unit_for(request.method)
    if unit.is_one_too_many:  # a subrequest takes part
        return handler(request)
    with unit:
        try:
            response = handler(request)
        except BaseException as error:
            unit.end(error)
            raise
        try:
            units.end(unit, response.status_int, response.headers.items())
        except Exception as error:  # noqa: BLE001  # raised, unless a view answers
            unit.renew()  # an exception view may ask for a session
            try:
                response = request.invoke_exception_view(sys.exc_info())
            except NotFound:
                raise error from None
            units.end(unit, response.status_int, response.headers.items())
        return response


def _units_of(request: Request) -> RequestUnits:
    units: RequestUnits | None = request.registry.get(_UNITS)
    if units is None:
        units = request.registry[_UNITS] = RequestUnits(_container_of(request), awaited=False)
    return units


def _mark(error: BaseException | None) -> None:
    if mark_error_retryable is not None and error is not None and retryable(error):
        mark_error_retryable(error)
