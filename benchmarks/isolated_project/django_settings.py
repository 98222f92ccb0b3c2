"""Settings of Django with a database for each URL."""

from __future__ import annotations

import json
import os
from urllib.parse import parse_qs, unquote, urlsplit


def _database(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path.removeprefix("/"),
        "USER": parts.username or "",
        "PASSWORD": unquote(parts.password or ""),
        "HOST": query.get("host", parts.hostname or ""),
        "PORT": query.get("port", str(parts.port or "")),
    }


DATABASES = {
    "default" if number == 0 else f"shop{number}": _database(url) for number, url in enumerate(json.loads(os.environ["URLS"]))
}
INSTALLED_APPS = ["rows"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
SECRET_KEY = "of a benchmark"
USE_TZ = True
