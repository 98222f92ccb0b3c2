"""Health: whether each database answers, how full the pools are, how far replicas are behind, and what is in doubt."""

from app_db.health._report import ConnectionHealth, Health, Status

__all__ = ["ConnectionHealth", "Health", "Status"]
