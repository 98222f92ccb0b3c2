"""app_db with Flask: docs/web.md."""

from __future__ import annotations

import os

from flask import Flask, Response, jsonify, request
from flask_routes import add_routes
from shared import SECOND_URL, URL, Item, SecondItem

from app_db import container_of
from app_db.integrations.flask import AppDb

NOT_OFFERED: dict[str, str] = {}

os.environ.update(APP_DB_CONNECTIONS__WRITER__URL=URL, APP_DB_CONNECTIONS__SECOND__URL=SECOND_URL, APP_DB_TWO_PHASE="true")
os.environ["APP_DB_APPLICATION"] = "compare"

# wiring begins
container = container_of("writer", "second")()
app = Flask(__name__)
AppDb(container, attempts=3).init_app(app)
# wiring ends


# endpoint begins
@app.post("/place")
def place() -> tuple[Response, int]:
    container.writer_session().add(Item(name=request.args["name"]))
    return jsonify({}), 201
    # endpoint ends


@app.post("/both")
def both() -> tuple[Response, int]:
    container.writer_session().add(Item(name=request.args["name"]))
    container.second_session().add(SecondItem(name=request.args["second"]))
    return jsonify({}), 201


add_routes(app, lambda: container.writer_session(), Item, doom=lambda: container.unit().doom())
