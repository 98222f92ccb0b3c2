"""An xid says whose branch it is, fits into every database's limits, and is never mistaken for somebody else's."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app_db._two_phase.xids import Xid, new_log_id, new_unit_id

applications = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,15}", fullmatch=True)
units = st.from_regex(r"[A-Za-z0-9]{22}", fullmatch=True)
connections = st.from_regex(r"[a-z][a-z0-9_]{0,21}(\.[1-9])?", fullmatch=True)
UNIT = "Log123" + "1vabcd" + "0123456789"


@given(applications, units, connections)
@example("A" * 16, "Z" * 22, "c" * 22 + ".9")
def test_an_xid_is_read_as_it_was_written(application: str, unit: str, connection: str) -> None:
    xid = Xid(application, unit, connection)
    assert Xid.parse(str(xid)) == xid
    assert Xid.parse(str(xid).encode()) == xid
    assert len(str(xid).encode()) <= 64


def test_the_longest_xid_has_as_many_bytes_as_mysql_takes() -> None:
    assert len(str(Xid("A" * 16, "Z" * 22, "c" * 22 + ".9")).encode()) == 64


@given(st.one_of(st.text(), st.binary(), st.from_regex(r"[a-z]*:[A-Za-z0-9]{20,23}:[a-z]*\n?")))
@example(f"shop:{UNIT}:writer\n")
@example(f"shop:{UNIT}:writer:more")
@example(f"shop:{UNIT}".encode())
@example("_sa_8b9c1d2e3f")
@example(b"\xff\xfe")
@example("é:\ud800:x")
@example(f"shop:{UNIT}:wri٣ter")
def test_anything_else_is_nobodys_xid(text: str | bytes) -> None:
    """Whatever does parse is spelled exactly so by the xid that it parses to."""
    xid = Xid.parse(text)
    spelled = text if isinstance(text, str) else text.decode("ascii", "replace")
    assert xid is None or str(xid) == spelled


@given(st.text(), st.text(), st.text())
@example("1shop", UNIT, "writer")
@example("shop\n", UNIT, "writer")
@example("a" * 17, UNIT, "writer")
@example("shop", UNIT + "x", "writer")
@example("shop", UNIT[1:] + "'", "writer")
@example("shop", UNIT, "Writer")
@example("shop", UNIT, "w" * 23)
@example("shop", UNIT, "")
def test_construction_is_as_strict_as_reading(application: str, unit: str, connection: str) -> None:
    text = f"{application}:{unit}:{connection}"
    try:
        spelled = str(Xid(application, unit, connection))
    except ValueError:
        assert Xid.parse(text) is None
    else:
        assert spelled == text
        assert Xid.parse(text) is not None


@pytest.mark.parametrize(
    "parts", [("1shop", UNIT, "writer"), ("shop", UNIT[1:], "writer"), ("shop", UNIT, "Writer"), ("shop", UNIT, None)]
)
def test_what_has_the_wrong_form_is_refused(parts: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match=r"can't be the .* of an xid"):
        Xid(*parts)


def test_a_unit_id_says_which_log_and_when() -> None:
    log = new_log_id()
    before = time.time()
    xid = Xid("shop", new_unit_id(log), "writer")
    assert xid.log == log
    assert int(before) <= xid.begun_at <= time.time()


def test_ids_are_made_once() -> None:
    log = new_log_id()
    assert len({new_unit_id(log) for _ in range(10_000)}) == 10_000
    assert len({new_log_id() for _ in range(1_000)}) == 1_000


def test_unit_ids_of_a_log_sort_as_they_were_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    log = new_log_id()
    times = [1_000.0, 2_000_000_000.0, 1_700_000_000.0, 1_700_000_001.0]
    ids = []
    for now in times:
        monkeypatch.setattr("time.time", lambda now=now: now)
        ids.append(new_unit_id(log))
    assert [Xid("shop", unit, "writer").begun_at for unit in sorted(ids)] == sorted(times)


@pytest.mark.parametrize("log", ["", "Log12", "Log1234", "Log12'", "Lög123"])
def test_a_unit_id_is_not_made_for_what_is_no_log(log: str) -> None:
    with pytest.raises(ValueError, match="can't be the log of an xid"):
        new_unit_id(log)
