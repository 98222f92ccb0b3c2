"""Serve the application of a program on a socket that was inherited. Run by the interpreter of the peer."""

from __future__ import annotations

import importlib
import socket
import sys
from typing import Any


def main(program: str, kind: str, descriptor: int) -> None:
    """Serve `app` of a program by uvicorn or waitress."""
    app: Any = importlib.import_module(program).app
    if kind == "asgi":
        import uvicorn
        from shared import PLACE

        if PLACE == "outside":
            from starlette_routes import Passing

            app = Passing(app)
        config = uvicorn.Config(app, log_level="critical", lifespan="auto", ws="websockets-sansio")
        uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])
    else:
        import waitress

        waitress.serve(app, sockets=[socket.socket(fileno=descriptor)], threads=8, _quiet=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
