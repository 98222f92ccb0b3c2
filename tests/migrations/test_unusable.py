"""What can't be run is refused before anything is changed, by an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, Table

from app_db import container_of, errors
from app_db.migrations import check, current, downgrade, history, revision, sql, stamp, upgrade
from app_db.models import metadata_of
from harness.migrated import Project, new_name
from harness.paths import run_python


@pytest.fixture
def project(tmp_path: Path, sqlite_url: str) -> Project:
    project = Project(tmp_path, writer=sqlite_url, log=f"{sqlite_url}.log")
    project.write_three("writer")
    return project


def test_two_newest_revisions(project: Project) -> None:
    project.write("writer", "d", down="b")
    with pytest.raises(errors.UnusableMigrations, match=r"2 newest revisions, c, d\. .*down_revision = 'c'"):
        upgrade(project.container)
    assert project.all_tables("writer") == set()


@pytest.mark.parametrize("twice", ["b", "c"])
def test_two_revisions_with_one_id(project: Project, twice: str) -> None:
    file = project.folder / "writer" / "versions" / f"{twice}.py"
    (file.parent / "copy.py").write_text(file.read_text())
    with pytest.raises(errors.UnusableMigrations, match=rf"{twice}\.py and copy\.py have the same id '{twice}'"):
        upgrade(project.container)
    assert project.all_tables("writer") == set()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("def upgrade(:", r"bad\.py can't be loaded \(SyntaxError"),
        ("import nowhere", r"bad\.py can't be loaded \(ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1", r"can't be loaded \(.*bad_py"),
        ("import sys\nsys.exit(3)", r"bad\.py can't be loaded \(SystemExit: 3\)"),
        ("revision = 5\ndown_revision = 'c'", r"bad\.py has revision = 5, which is no text\. Write the id in quotes"),
        ("revision: str = 'd'\ndown_revision: str = 5", r"bad\.py has down_revision: str = 5, which is no text"),
        ("revision, down_revision = 'bad', 'missing'", r"down_revision 'missing', which is not there"),
    ],
    ids=["syntax", "import", "no revision", "exit", "number", "number before", "no such revision before"],
)
@pytest.mark.filterwarnings("ignore:Revision missing referenced")
def test_a_malformed_revision(project: Project, text: str, match: str) -> None:
    (project.folder / "writer" / "versions" / "bad.py").write_text(text)
    with pytest.raises(errors.UnusableMigrations, match=match):
        current(project.container)
    assert project.all_tables("writer") == set()


def test_a_revision_without_a_function(project: Project) -> None:
    (project.folder / "writer" / "versions" / "d.py").write_text("revision, down_revision = 'd', 'c'")
    with pytest.raises(errors.UnusableMigrations, match=r"d\.py has no function upgrade\(\)"):
        upgrade(project.container)
    (project.folder / "writer" / "versions" / "d.py").write_text("revision, down_revision = 'd', 'c'\ndef upgrade(): ...")
    stamp(project.container)
    with pytest.raises(errors.UnusableMigrations, match=r"d\.py has no function downgrade\(\)"):
        downgrade(project.container, "base")
    stamp(project.container, "base")
    assert project.tables("writer") == set()


def test_a_coroutine_function(project: Project) -> None:
    (project.folder / "writer" / "versions" / "d.py").write_text("revision, down_revision = 'd', 'c'\nasync def upgrade(): ...")
    with pytest.raises(errors.UnusableMigrations, match=r"upgrade\(\) of .*d\.py is a coroutine function"):
        upgrade(project.container)


@pytest.mark.parametrize("function", [upgrade, current, history, check])
def test_a_container_class_instead_of_an_instance(project: Project, function: object) -> None:
    with pytest.raises(errors.InvalidUse, match=r"is no database container\. Give an instance, such as Container\(\)"):
        function(container_of("writer"), directory=project.folder)  # type: ignore[operator]


@pytest.mark.parametrize("message", ["", " "])
def test_a_revision_without_a_message(project: Project, message: str) -> None:
    with pytest.raises(errors.InvalidUse, match="Say in a few words what changes"):
        revision(project.container, message, autogenerate=False, connections=["writer"])
    assert sorted(file.name for file in (project.folder / "writer" / "versions").glob("*.py")) == ["a.py", "b.py", "c.py"]


def test_a_folder_that_can_not_be_written(project: Project) -> None:
    folder = project.folder / "log"
    folder.write_text("a file")
    match = rf"'log' can't be used: no revision can be written into {folder}/versions \(Not a directory: .*--directory\)\.\n"
    for directory in (None, "migrations"):
        with pytest.raises(errors.UnusableMigrations, match=match):
            revision(project.container, "empty", autogenerate=False, connections=["log"], directory=directory)
    with pytest.raises(errors.UnusableMigrations, match=r"into /proc/nope/log/versions \(No such file or directory: /proc/nope"):
        revision(project.container, "empty", autogenerate=False, connections=["log"], directory="/proc/nope")


def test_a_second_folder_that_can_not_be_written(tmp_path: Path, sqlite_url: str) -> None:
    """The error says which files were written before."""
    first, second = new_name(), new_name()
    for name in (first, second):
        Table("orders", metadata_of(name), Column("id", Integer, primary_key=True))
    with Project(tmp_path, **{first: sqlite_url, second: f"{sqlite_url}.2"}) as project:
        project.folder.mkdir()
        (project.folder / second).write_text("a file")
        with pytest.raises(errors.UnusableMigrations, match=rf"{second}/versions.* these were written: .*\. Delete") as caught:
            revision(project.container, "orders", connections=[first, second])
        [written] = (project.folder / first / "versions").glob("*.py")
        assert str(written) in str(caught.value)
        written.unlink()
        (project.folder / second).unlink()
        assert len(revision(project.container, "orders", connections=[first, second])) == 2


def test_an_unknown_connection(project: Project) -> None:
    with pytest.raises(errors.UnknownConnection, match="'writter'"):
        upgrade(project.container, connections=["writter"])


@pytest.mark.parametrize("function", [upgrade, check])
def test_one_name_instead_of_a_list(project: Project, function: object) -> None:
    with pytest.raises(errors.InvalidUse, match=r"Write connections=\['writer'\]"):
        function(project.container, connections="writer")  # type: ignore[operator]


@pytest.mark.parametrize("function", [upgrade, stamp])
def test_an_unknown_revision(project: Project, function: object) -> None:
    with pytest.raises(errors.UnusableMigrations, match=r"there is no revision 'nonsense'\. The revisions are: a, b, c"):
        function(project.container, "nonsense")  # type: ignore[operator]
    with pytest.raises(errors.UnusableMigrations, match=r"'-9'"):
        downgrade(project.container, "-9")


def test_more_revisions_than_there_are(project: Project) -> None:
    """The error says where the database is, and quotes nothing of Alembic's."""
    at_base = r"no (down|up)grade leads to '[-+]\w': the database is at its base, with no revision to undo and 3 to run\. The rev"
    with pytest.raises(errors.UnusableMigrations, match=at_base):
        downgrade(project.container, "-1")
    with pytest.raises(errors.UnusableMigrations, match=at_base):
        upgrade(project.container, "+4")
    upgrade(project.container, "a")
    with pytest.raises(errors.UnusableMigrations, match=r"'-2': .* at 'a', with 1 revision to undo and 2 to run\. The revisions"):
        downgrade(project.container, "-2")
    with pytest.raises(errors.UnusableMigrations, match=r"no downgrade leads to 'c': .* at 'a', with 1 revision to undo"):
        downgrade(project.container, "c")
    upgrade(project.container)
    with pytest.raises(errors.UnusableMigrations, match=r"'\+1': .* at 'c', with 3 revisions to undo and none to run\. The rev"):
        upgrade(project.container, "+1")
    for target in ("a-4", "a+7"):
        with pytest.raises(errors.UnusableMigrations, match=r"there is no revision 'a.\d'\. The revisions are"):
            stamp(project.container, target)


@pytest.mark.parametrize("target", ["", None, "@"])
@pytest.mark.parametrize("function", [upgrade, downgrade, stamp])
def test_what_names_no_revision(project: Project, function: object, target: str | None) -> None:
    upgrade(project.container)
    with pytest.raises(errors.UnusableMigrations, match=r"The revisions are: a, b, c\."):
        function(project.container, target)  # type: ignore[operator]
    assert project.revision_in("writer") == ["c"]


@pytest.mark.parametrize("target", ["-1", "+1"])
@pytest.mark.parametrize("function", [stamp, sql])
def test_a_stamp_and_sql_do_not_count_from_here(project: Project, function: object, target: str) -> None:
    with pytest.raises(errors.UnusableMigrations, match=r"counts from another revision\. Give an id, head or base"):
        function(project.container, target)  # type: ignore[operator]


def test_a_connection_without_a_folder(project: Project) -> None:
    with pytest.raises(
        errors.UnusableMigrations, match=r"'log'.*no folder .*log/versions.*app-db revision --connection log -m '"
    ):
        upgrade(project.container, connections=["log"])


def test_no_folder_at_all(tmp_path: Path, sqlite_url: str) -> None:
    with (
        Project(tmp_path, writer=sqlite_url) as project,
        pytest.raises(errors.InvalidUse, match=r"no migrations in .*elsewhere.*'writer'.*app-db revision -m '.*directory"),
    ):
        upgrade(project.container, directory="elsewhere")


def test_read_only_connections_and_mirrors_have_none(tmp_path: Path, sqlite_url: str) -> None:
    connections: dict[str, str | dict[str, object]] = {
        "writer": sqlite_url,
        "copy": {"mirror": "writer"},
        "archive": {"url": f"{sqlite_url}.2", "read_only": True},
    }
    with Project(tmp_path, **connections) as project:
        for name in connections:
            project.write_three(name)
        assert [each.connection for each in upgrade(project.container)] == ["writer"]
        with pytest.raises(errors.InvalidUse, match="'copy' has no migrations: it mirrors"):
            upgrade(project.container, connections=["copy"])
        with pytest.raises(errors.InvalidUse, match=r"'archive' has no migrations: it is read-only.*ARCHIVE__READ_ONLY"):
            check(project.container, connections=["archive"])


def test_several_connections_are_not_undone_by_a_slip(project: Project) -> None:
    project.write_three("log")
    upgrade(project.container)
    with pytest.raises(errors.InvalidUse, match=r"Several.*'log', 'writer'.*Name those to downgrade"):
        downgrade(project.container, "-1")
    with pytest.raises(errors.InvalidUse, match="Name those to write an empty revision for"):
        revision(project.container, "empty", autogenerate=False)


def test_inside_a_unit_of_work_that_uses_the_database(project: Project) -> None:
    with project.container.transaction():
        project.container.writer_session().connection()
        with pytest.raises(errors.InvalidUse, match="inside a unit of work"):
            upgrade(project.container)


# ---- pyproject.toml --------------------------------------------------------------------------------------------------------


def test_pyproject_names_the_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.folder.rename("schema")
    Path("pyproject.toml").write_text('[tool.app_db]\nmigrations = "schema"\n')
    assert upgrade(project.container)[0].after == "c"
    assert upgrade(project.container, directory="schema")[0].after == "c"
    monkeypatch.chdir(project.folder.parent / "schema" / "writer")  # below it, as seen from the file
    assert upgrade(project.container)[0].after == "c"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[tool.app_db\n", r"pyproject\.toml is no valid TOML"),
        ("[tool.app_db]\nmigrations = 3\n", r"does not name the folder.*migrations = "),
        ("[tool]\napp_db = 'x'\n", r"does not name the folder"),
    ],
)
def test_a_corrupt_pyproject(project: Project, text: str, match: str) -> None:
    Path("pyproject.toml").write_text(text)
    with pytest.raises(errors.InvalidUse, match=match):
        upgrade(project.container)


@pytest.mark.exhaustive
def test_without_alembic() -> None:
    program = (
        "import sys\nsys.modules['alembic'] = None\nimport app_db\n"
        "try:\n    import app_db.migrations\nexcept app_db.errors.AlembicMissing as error:\n    print(error.message)"
    )
    assert run_python("-c", program).stdout == "Migrations need Alembic, which is not installed. pip install 'app-db[alembic]'.\n"
