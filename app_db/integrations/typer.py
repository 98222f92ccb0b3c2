"""Typer: a command is a unit of work.

>>> import typer
>>> from app_db import Container
>>> from app_db.integrations.typer import in_unit
>>> container = Container()
>>> app = typer.Typer()
>>> @app.command()
... @in_unit(container)
... def order(sku: str) -> None:
...     container.writer.session()
"""

from __future__ import annotations

from app_db.integrations.click import in_unit

__all__ = ["in_unit"]
