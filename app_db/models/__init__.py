"""Declarative bases and MetaData for each connection, and the connection of a model."""

from app_db.models._bases import CONNECTION, Reflected, connection_of, metadata_of, orm_base
from app_db.models._schema import include_name

__all__ = ["CONNECTION", "Reflected", "connection_of", "include_name", "metadata_of", "orm_base"]
