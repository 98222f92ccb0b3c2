"""wireup with Flask: https://maldoinc.github.io/wireup/latest/integrations/flask/.

https://maldoinc.github.io/wireup/latest/resources/ shows a factory that rolls back if there was an error. It shows no
commit: this one commits where that error would have been raised.
"""

from __future__ import annotations

from collections.abc import Iterator

import wireup
import wireup.integration.flask
from flask import Flask, Response, jsonify, request
from flask_routes import add_routes
from shared import URL, Item
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session
from wireup import Injected, injectable
from wireup.integration.flask import get_request_container

NOT_OFFERED = {
    "veto by header": "a factory sees no response",
    "retry": "it repeats no request",
    "two databases": "it injects what it is given, and has no transaction of its own",
}


# wiring begins
@injectable
def engine() -> Engine:
    return create_engine(URL)


@injectable(lifetime="scoped")
def get_session(engine: Engine) -> Iterator[Session]:
    with Session(engine, expire_on_commit=False) as session:
        yield session
        session.commit()


# wiring ends

# wiring begins
app = Flask(__name__)
# wiring ends


# endpoint begins
@app.post("/place")
def place(session: Injected[Session]) -> tuple[Response, int]:
    session.add(Item(name=request.args["name"]))
    return jsonify({}), 201
    # endpoint ends


add_routes(app, lambda: get_request_container().get(Session), Item)

# wiring begins
container = wireup.create_sync_container(injectables=[engine, get_session])
wireup.integration.flask.setup(container, app)
# wiring ends
