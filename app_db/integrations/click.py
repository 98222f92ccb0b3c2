"""click and Typer: a command is a unit of work.

>>> import click
>>> from app_db import Container
>>> from app_db.integrations.click import in_unit
>>> container = Container()
>>> @click.command()
... @click.argument("sku")
... @in_unit(container)
... def order(sku: str) -> None:
...     container.writer.session()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast

from app_db import DatabaseContainer
from app_db.errors import InvalidUse

__all__ = ["in_unit"]

P = ParamSpec("P")
R = TypeVar("R")


def in_unit(container: DatabaseContainer, **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a command. It runs in a unit of work, with the options of `container.transaction()`.

    The unit commits if the command returns or exits with 0: by `sys.exit(0)`, `ctx.exit()` or `typer.Exit()`. Another code, and
    any other exception, aborts it. Write it next to the function, below `@click.command()`.
    """
    container.transaction(**options)  # raises for wrong options, before a command runs

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        if iscoroutinefunction(command):
            raise InvalidUse(
                f"The command {command!r} is a coroutine function", "Write a plain function, and call asyncio.run() in it"
            )

        @wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            exits: list[BaseException] = []

            @wraps(command)  # the unit is named after it
            def until_exit() -> R | None:
                try:
                    return command(*args, **kwargs)
                except BaseException as leaving:
                    if not _exits_with_0(leaving):
                        raise
                    exits.append(leaving)
                    return None

            result = container.transaction(**options).run(until_exit)
            if exits:
                raise exits[-1]
            return cast("R", result)  # None comes with an exit only

        return run

    return decorate


def _exits_with_0(error: BaseException) -> bool:
    """Return whether an exception is an exit that reports success: SystemExit, or that of click or Typer."""
    if isinstance(error, SystemExit):
        return error.code in (None, 0)
    return getattr(error, "exit_code", None) == 0
