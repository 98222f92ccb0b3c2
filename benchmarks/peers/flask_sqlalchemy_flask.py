"""Flask-SQLAlchemy: https://flask-sqlalchemy.readthedocs.io/en/stable/quickstart/ and https://flask-sqlalchemy.readthedocs.io/en/stable/binds/.

It has no mode that commits by itself: an endpoint calls `db.session.commit()`. `session_options` are SQLAlchemy's own;
`twophase` is the one by which a session commits in several databases.
"""

from __future__ import annotations

from flask import Flask, Response, jsonify, request
from flask_routes import add_routes
from flask_sqlalchemy import SQLAlchemy
from shared import SECOND_URL, URL
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NOT_OFFERED = {
    "veto by header": "an endpoint commits by itself",
    "retry": "it repeats no request",
}


# wiring begins
class Base(DeclarativeBase):
    pass


app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = URL
app.config["SQLALCHEMY_BINDS"] = {"second": SECOND_URL}  # for two databases
db = SQLAlchemy(app, model_class=Base, session_options={"twophase": True})
# wiring ends


class Item(db.Model):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class SecondItem(db.Model):
    __bind_key__ = "second"
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


# endpoint begins
@app.post("/place")
def place() -> tuple[Response, int]:
    db.session.add(Item(name=request.args["name"]))
    db.session.commit()
    return jsonify({}), 201
    # endpoint ends


@app.post("/both")
def both() -> tuple[Response, int]:
    db.session.add(Item(name=request.args["name"]))
    db.session.add(SecondItem(name=request.args["second"]))
    db.session.commit()
    return jsonify({}), 201


add_routes(app, lambda: db.session(), Item, lambda: db.session.commit())
