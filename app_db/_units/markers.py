"""Markers of dependency-injector, `Provide[...]` and its kind, in the parameters of a function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, Signature
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, Union, cast, get_args, get_origin, overload

from dependency_injector.wiring import Closing, inject
from sqlalchemy.orm import Session

from app_db.errors import InvalidUse, NotWired

if TYPE_CHECKING:
    from dependency_injector import providers

    T = TypeVar("T")

    class _Provide(Protocol):
        """dependency-injector's `Provide`, with the type that the provider returns. Its own stub says Any."""

        @overload
        def __getitem__(self, provider: providers.Provider[T], /) -> T: ...
        @overload
        def __getitem__(self, name: object, /) -> Any: ...

    Provide: _Provide
    """A marker for the argument that a provider returns: `session: Session = Provide[Container.writer.session]`."""
else:
    from dependency_injector.wiring import Provide  # noqa: F401  # app_db exports it

Function = Callable[..., Any]
"""A function of the application."""

_MENTIONS_A_MARKER = re.compile(r"\b(Provide|Provider|Closing)\[")


def is_marker(value: object) -> bool:
    return getattr(type(value), "__IS_MARKER__", False) is True


def evaluated_signature(function: Function, name: str) -> Signature:
    """Return the function's signature. Annotations that are strings are evaluated, if they can be.

    Raises InvalidUse if one mentions a marker and can't be evaluated: its parameter would not be injected.
    """
    # dependency-injector does not evaluate the strings that `from __future__ import annotations` makes.
    signature = inspect.signature(function)
    names = getattr(inspect.unwrap(function), "__globals__", {})

    def evaluated(annotation: object, owner: str) -> object:
        if not isinstance(annotation, str):
            return annotation
        try:
            return eval(annotation, names)  # noqa: S307  # Python itself would evaluate it here, without the future import
        except Exception as error:
            if _MENTIONS_A_MARKER.search(annotation) is None:
                return annotation
            raise InvalidUse(
                f"The annotation of {owner} of {name} can't be evaluated: {type(error).__name__}: {error}",
                f"Define the names in {annotation!r} in the module, above the function and not under TYPE_CHECKING, or write "
                "the marker as a default, `= Provide[...]`",
            ) from error

    return signature.replace(
        parameters=[
            parameter.replace(annotation=evaluated(parameter.annotation, f"the parameter {parameter.name!r}"))
            for parameter in signature.parameters.values()
        ],
        return_annotation=evaluated(signature.return_annotation, "the result"),
    )


def markers_in(signature: Signature) -> dict[str, Any]:
    """Return the markers by parameter: of defaults, and of `Annotated` metadata. Each may be in a `Depends`."""
    found = {name: _marker_of(parameter) for name, parameter in signature.parameters.items()}
    return {name: marker for name, marker in found.items() if marker is not None}


def _marker_of(parameter: Parameter) -> Any:
    metadata = get_args(parameter.annotation)[1:] if get_origin(parameter.annotation) is Annotated else ()
    for candidate in (*metadata, parameter.default):
        marker = getattr(candidate, "dependency", None) if _is_depends(candidate) else candidate
        if is_marker(marker):
            return marker
    return None


def _is_depends(value: Any) -> bool:
    # By name, since FastAPI may be missing. By type, since a lazy proxy as a default must not be asked for attributes yet.
    return any(base.__name__ in {"Depends", "Dependant"} for base in type(value).__mro__)


def callers_signature(signature: Signature, injected: Iterable[str]) -> Signature:
    """Return the signature without its injected parameters.

    A parameter that follows an injected one can be passed by keyword only. By position, its argument
    would be taken for the injected one's.
    """
    injected = set(injected)
    parameters: list[Parameter] = []
    follows = False
    for name, parameter in signature.parameters.items():
        if name in injected:
            follows = follows or parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        elif not follows or parameter.kind in {Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD}:
            parameters.append(parameter)
        elif parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    return signature.replace(parameters=parameters)


def _wants_async(annotation: object) -> bool | None:
    """Return whether an annotation allows an async session or a sync one, perhaps with None. Return None if it isn't clear."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    classes = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
    wanted = {_is_async_class(given) for given in classes if given is not NoneType}
    return wanted.pop() if len(wanted) == 1 else None


def _is_async_class(given: object) -> bool | None:
    if not isinstance(given, type):
        return None
    if issubclass(given, Session):
        return False
    # By name, because the import may need greenlet.
    return True if "AsyncSession" in {base.__name__ for base in given.__mro__} else None


def _require_kind(name: str, parameter: str, session: Any, wants_async: bool) -> None:
    """Raise InvalidUse for a sync session if an async one is wanted, and for an async one if a sync one is."""
    if wants_async:
        given, wanted, written, right = "sync", "async_session", "AsyncSession", "Session"
    elif isinstance(getattr(session, "sync_session", None), Session):
        given, wanted, written, right = "async", "session", "Session", "AsyncSession"
    else:
        return  # a fake
    connection = getattr(getattr(session, "config", None), "name", "NAME")
    # The session that finds its database has this name, which no connection can have.
    path, whose = ("", "container's ") if connection == "session" else (f"{connection}.", f"{connection!r} ")
    raise InvalidUse(
        f"The parameter {parameter!r} of {name} is annotated with {written}, but was given the {whose}{given} session",
        f"Write `Provide[Container.{path}{wanted}]`, or annotate it with {right}",
    )


def inject_checked(function: Function, name: str, signature: Signature, markers: Mapping[str, Any]) -> Function:
    """Return `function` with its markers injected.

    It raises NotWired if a marker was not replaced, and InvalidUse if a session is sync and its
    annotation async, or the other way round.
    """
    wants_async = {parameter: _wants_async(signature.parameters[parameter].annotation) for parameter in markers}

    @wraps(function)
    def checked(*args: object, **kwargs: object) -> object:
        for parameter, marker in markers.items():
            value, wanted = kwargs.get(parameter, marker), wants_async[parameter]
            # The checks are written out, because each call of a function is felt in a small unit.
            if getattr(type(value), "__IS_MARKER__", False) is True:
                raise NotWired(name, function.__module__, parameter, f"{type(marker).__name__}[{marker.provider!r}]")
            if wanted is not None and isinstance(value, Session) is wanted:
                _require_kind(name, parameter, value, wanted)
            if is_async and inspect.isawaitable(value):  # an async provider returned it
                return checked_awaited(*args, **kwargs)
        return function(*args, **kwargs)

    @wraps(function)
    async def checked_awaited(*args: object, **kwargs: object) -> object:
        for parameter in markers:
            value = kwargs.get(parameter)
            if inspect.isawaitable(value):
                kwargs[parameter] = await value
        return await cast("Awaitable[object]", checked(*args, **kwargs))

    is_async = inspect.iscoroutinefunction(function)
    # What Closing ends must last as long as the coroutine. Elsewhere a plain function will do, and is not in every traceback.
    closes = any(isinstance(marker, cast("type", Closing)) for marker in markers.values())
    wrapper: Any = checked_awaited if is_async and closes else checked
    # inject() reads the markers from here, so that every spelling is a default to it.
    wrapper.__signature__ = Signature(
        [Parameter(parameter, Parameter.KEYWORD_ONLY, default=marker) for parameter, marker in markers.items()]
    )
    injected: Function = inject(wrapper)
    return injected
