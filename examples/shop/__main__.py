"""Start an application of the shop: `python -m shop fastapi`, `flask`, `pyramid` or `worker`.

It looks first whether all that the application needs is there, and says in one error what is missing.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from app_db import AppDbError
from shop.container import container
from shop.opening import ShopSettings, open_shop


class CannotStartError(Exception):
    """Something is missing. The message says what, and what to do."""


def serve_fastapi(settings: ShopSettings) -> None:
    """Serve the FastAPI application by uvicorn."""
    import uvicorn

    from shop.fastapi_app import app

    uvicorn.run(app, port=settings.port)


def serve_flask(settings: ShopSettings) -> None:
    """Serve the Flask application by waitress."""
    import waitress

    from shop.flask_app import create_app

    waitress.serve(create_app(), listen=f"127.0.0.1:{settings.port}")


def serve_pyramid(settings: ShopSettings) -> None:
    """Serve the Pyramid application as pserve does."""
    from pyramid.scripts.pserve import main

    sys.exit(main(["pserve", str(Path(__file__).with_name("pyramid.ini")), f"http_port={settings.port}"]))


def work(settings: ShopSettings) -> None:
    """Send letters: a Celery worker."""
    if not settings.broker:
        raise CannotStartError(
            "SHOP_BROKER is not set: the worker has no broker. Start one, redis-server for example, and set its URL in the\n"
            "environment or in .env, for the web application, too: SHOP_BROKER=redis://127.0.0.1:6379/0"
        )
    from shop.tasks import app

    app.worker_main(["worker", "--loglevel=INFO", "--concurrency=2"])


APPLICATIONS = {"fastapi": serve_fastapi, "flask": serve_flask, "pyramid": serve_pyramid, "worker": work}


def require_databases() -> None:
    """Connect to each database once."""
    for name in container.settings().connections:
        engine = container.connection(name).engine()
        try:
            engine.connect().close()
        except DBAPIError as error:
            raise CannotStartError(
                f"There is no connection to {engine.url.render_as_string(hide_password=True)}: {error.orig}\n"
                f"Start the database, or change APP_DB_CONNECTIONS__{name.upper()}__URL, in the environment or in .env."
            ) from None


def require_broker(url: str) -> None:
    """Connect to the broker once."""
    from kombu.exceptions import KombuError
    from kombu.utils.url import maybe_sanitize_url

    from shop.tasks import app

    try:
        with app.connection_for_write() as broker:
            broker.ensure_connection(max_retries=1, interval_start=0)
    except (KombuError, OSError, KeyError) as error:  # KeyError: the URL begins with an unknown word
        raise CannotStartError(
            f"There is no broker at {maybe_sanitize_url(url)}: {error}\n"
            "Start one, or change SHOP_BROKER, in the environment or in .env. Without it, the web applications need no broker."
        ) from None


def main() -> None:
    """Start what the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in APPLICATIONS:
        sys.exit(f"Usage: python -m shop {'|'.join(APPLICATIONS)}")
    logging.basicConfig(format="%(name)s: %(message)s")
    for name in ("shop", "waitress"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        settings = ShopSettings()
        require_databases()
        if settings.broker:
            require_broker(settings.broker)
        open_shop()
        APPLICATIONS[sys.argv[1]](settings)
    except ValidationError as error:
        sys.exit("\n".join(f"SHOP_{str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors()))
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed, and this application needs it: pip install {error.name}")
    except (AppDbError, CannotStartError, ImportError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
