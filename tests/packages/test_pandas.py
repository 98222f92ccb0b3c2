"""pandas reads and writes on the unit's connection, as a part of the unit, and on the engine, by itself."""

from __future__ import annotations

import pandas as pd
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, inspect, select
from sqlalchemy.exc import DBAPIError

from app_db.errors import ReadOnlyViolation
from harness.applications import Item, running
from harness.shops import NewShop

METADATA = MetaData()
SALES = Table("sales", METADATA, Column("sku", String(20)), Column("amount", Integer))
FRAME = pd.DataFrame({"sku": ["a", "b"], "amount": [1, 2]})


def test_it_takes_part_in_the_unit(new_shop: NewShop) -> None:
    shop = new_shop(METADATA)

    def work(fails: bool) -> None:
        with shop.container.transaction():
            connection = shop.session().connection()
            FRAME.to_sql("sales", connection, if_exists="append", index=False)
            FRAME.to_sql("copies", connection, if_exists="replace", index=False)
            shop.session().execute(SALES.update().values(amount=SALES.c.amount + 1))
            assert pd.read_sql_query(select(SALES).order_by(SALES.c.sku), connection)["amount"].to_list()[-1] == 3
            assert len(pd.read_sql_table("copies", connection)) == 2
            if fails:
                raise ValueError("mine")

    with shop.test():
        with pytest.raises(ValueError, match="mine"):
            work(fails=True)
        work(fails=False)
        with shop.container.transaction():
            found = pd.read_sql("SELECT sku, amount FROM sales ORDER BY sku", shop.session().connection())
        assert found.to_dict("list") == {"sku": ["a", "b"], "amount": [2, 3]}
    assert inspect(shop.plain["writer"]).has_table("copies") is not shop.is_isolated


def test_it_commits_by_itself_on_the_engine(new_shop: NewShop) -> None:
    shop = new_shop(METADATA)
    with shop.test():
        engine = shop.engine()
        FRAME.to_sql("sales", engine, if_exists="append", index=False)
        assert pd.read_sql_table("sales", engine)["sku"].to_list() == ["a", "b"]
        chunks = pd.read_sql_query(select(SALES.c.amount).order_by(SALES.c.sku), engine, chunksize=1)
        assert [chunk["amount"].to_list() for chunk in chunks] == [[1], [2]]
        assert len(shop.read(SALES.c.sku)) == 2
    assert shop.rows() == ({} if shop.is_isolated else {"writer.sales": 2})


def test_a_reader_reads_and_does_not_write(postgres_url: str) -> None:
    with running(writer=postgres_url, reader={"mirror": "writer", "read_only": True}) as app:
        app.put("a")
        with app.unit():
            connection = app.session("reader").connection()
            assert pd.read_sql_query(select(Item.name), connection)["name"].to_list() == ["a"]
            with pytest.raises(ReadOnlyViolation, match="reader"):
                pd.DataFrame({"name": ["b"]}).to_sql("items", connection, if_exists="append", index=False)
        with pytest.raises((DBAPIError, pd.errors.DatabaseError), match="read-only"):  # the first from pandas before 3
            pd.DataFrame({"name": ["b"]}).to_sql("items", app.engine("reader"), if_exists="append", index=False)
        assert pd.read_sql_query(select(Item.name), app.engine("reader"))["name"].to_list() == ["a"]
