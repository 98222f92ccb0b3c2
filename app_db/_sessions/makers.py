"""The sessionmakers of a connection, and the classes of its unit's sessions, which are made from them.

`container.writer_sessionmaker()` is SQLAlchemy's `sessionmaker` in every respect. Its sessions
belong to no unit of work. The sessions of units have its class and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from sqlalchemy.orm import Session, sessionmaker

from app_db._sessions.providers import Held
from app_db.errors import InvalidUse

if TYPE_CHECKING:
    from dependency_injector import providers
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import async_sessionmaker

    from app_db.settings import ConnectionSettings, SessionSettings

S = TypeVar("S")
M = TypeVar("M", bound="sessionmaker[Any] | async_sessionmaker[Any]")


class ConnectionSessionmaker(sessionmaker[Session]):
    """A sessionmaker whose sessions use the engine that the connection has when they are made."""

    def __init__(self, engine: Callable[[], Engine], settings: SessionSettings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._engine = engine
        configure(self, settings)
        self._as_made = dict(self.kw)

    @property
    def is_as_made(self) -> bool:
        """Whether the application has changed neither its arguments nor the class of its sessions."""
        return self.kw == self._as_made and self.class_.__bases__ == (Session,)  # SQLAlchemy makes a subclass of the class

    def __call__(self, **local_kw: Any) -> Session:
        if self.kw["bind"] is None:
            local_kw.setdefault("bind", self._engine())
        return super().__call__(**local_kw)

    def __copy__(self) -> Self:
        return copied(self)


def build_sessionmaker(
    connection: ConnectionSettings, engine: Callable[[], Engine], session_class: type[Session] | None
) -> sessionmaker[Session]:
    """Return the sessionmaker of one connection."""
    class_ = session_class or connection.load_session_class("class", Session) or Session
    return ConnectionSessionmaker(engine, connection.session, class_=class_)


def copied(maker: M) -> M:
    """Return a sessionmaker with a class and arguments of its own: `configure` and listeners do not count in units.

    sqladmin, for example, configures the sessionmaker that it is given with `autoflush=False`.
    """
    made: M = object.__new__(type(maker))
    made.__dict__.update(maker.__dict__, kw=dict(maker.kw), class_=type(maker.class_.__name__, (maker.class_,), {}))
    return made


def configure(maker: Any, settings: SessionSettings) -> None:
    """Give a sessionmaker its settings. What is not set has SQLAlchemy's default there, and app_db's in units."""
    maker.kw["autoflush"] = settings.autoflush
    del maker.kw["expire_on_commit"]
    if settings.expire_on_commit is not None:
        maker.kw["expire_on_commit"] = settings.expire_on_commit


# ---- in units of work ----------------------------------------------------------------------------------------------


class UnitSessionmaker(sessionmaker[Any]):
    """Makes the sessions of units from the class and the arguments that the connection's sessionmaker has at that time."""

    def __init__(self, config: Any, provider: providers.Provider[Any], class_for: Callable[[object], type[Any]]) -> None:
        super().__init__()
        self.kw = {"config": config}
        self._provider = provider
        self._class_for = class_for
        self._own = provider.own() if isinstance(provider, Held) else provider()
        self._learn(self._own)

    def __call__(self, **local_kw: Any) -> Any:
        overridden: Sequence[object] = self._provider.overridden
        maker = self._provider() if overridden else self._own
        if maker is not self._known:
            self._learn(maker)
        kw = maker.kw
        if "info" in local_kw and "info" in kw:
            local_kw["info"] = {**kw["info"], **local_kw["info"]}
        return self.class_(**{"expire_on_commit": False, **kw, **local_kw, "bind": None, **self.kw})

    @property
    def is_as_made(self) -> bool:
        """Whether the application has changed neither the sessionmaker nor the class of its sessions."""
        return not self._provider.overridden and bool(getattr(self._own, "is_as_made", False))

    def _learn(self, maker: Any) -> None:
        class_ = self._class_for(maker)
        name, bind = self.kw["config"].name, maker.kw.get("bind")
        if bind is not None and bind != self.kw["config"].engine():
            raise InvalidUse(
                f"The sessionmaker that overrides {name!r} is bound to another engine than the connection",
                f"Override {name}_engine, and make the sessionmaker without `bind`",
            )
        self.class_ = class_
        self._known = maker


def unit_class(base: type[S], maker: object) -> type[S]:
    """Return the class of a unit's sessions: `base`, which knows the unit, before the class of the connection's sessionmaker."""
    if not isinstance(maker, sessionmaker):
        raise not_a_maker(maker, "sessionmaker")
    return derived(base, maker.class_)


def derived(base: type[S], own: type[Any]) -> type[S]:
    return cast("type[S]", own if issubclass(own, base) else type(own.__name__, (base, own), {}))


def not_a_maker(maker: object, wanted: str) -> InvalidUse:
    return InvalidUse(
        f"A unit of work can't make its session by a {type(maker).__name__}",
        f"Override the provider with SQLAlchemy's {wanted}, whose class and arguments the unit's sessions get",
    )
