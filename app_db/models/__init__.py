"""Bases and metadata by connection name, and which connection a model belongs to."""

from app_db.models._bases import CONNECTION, Reflected, connection_of, metadata_of, orm_base

__all__ = ["CONNECTION", "Reflected", "connection_of", "metadata_of", "orm_base"]
