"""`fleece find` with the index against `fleece find` without: always the same answer, whatever happened between."""

import json
import os
import signal
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio

from agent.archive_listing import Found
from agent.find_index import answering
from agent.find_index.answering import index_status, remove_index
from agent.find_index.errors import DamagedIndexError, IndexFileError, NoIndexError
from agent.find_index.files import IndexFile
from agent.find_index.recording import Records
from agent.find_index.updating import Updated
from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.names import Namespace, Snapshot
from repository.local import open_local
from tests.agent.conftest import PATIENCE_S, Fleece
from tests.support.archived_trees import Tree, store_trees
from tests.support.cache import ROOT
from tests.support.finder import PATTERNS, Finder
from tests.support.stores import chunk_files

BEFORE: Tree = {
    b"deep": {b"a": {b"b": {b"c.docx": (b"1", 1)}}},
    b"etc": {b"hosts": (b"127", 5), b"ssh": {b"sshd.conf": (b"22", 6)}},
    b"etc.docx": (b"x", 7),
    b"odd\xff": (b"", -1),
    b"srv": {b"app.conf": (b"x", 8)},
}
AFTER: Tree = {
    b"etc": {b"hosts": (b"127 1", 9), b"new": {b"hosts": (b"", 1)}, b"ssh": (b"a file now", 10)},
    b"etc.docx": {b"hosts": (b"a directory now", 11)},
    b"srv": {b"app.conf": (b"x", 8)},
}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
async def finder(store_folder: Path) -> AsyncIterator[Finder]:
    repository = await open_local(store_folder, name="main")
    yield Finder(repository)
    repository.close()


def at(day: int, group: str = "host/web", ns: str = "") -> Snapshot:
    return Snapshot.parse(f"{group}/2026-01-{day:02}T00:00:00Z", Namespace.parse(ns))


async def fill(finder: Finder) -> None:
    """Two groups, a namespace, both forms of archives, an archive that comes and goes."""
    repository = finder.repository
    await repository.create_namespace(Namespace.parse("a"))
    await store_trees(repository, at(1), {"root": BEFORE, "etc": {b"hosts": (b"", 1)}})
    await store_trees(repository, at(2), {"root": BEFORE}, catalog=True)
    await store_trees(repository, at(3), {"root": AFTER, "etc": {}}, catalog=True)
    await store_trees(repository, at(4), {"root": AFTER})
    await store_trees(repository, at(2, "host/db"), {"root": {}})
    await store_trees(repository, at(2, "vm/100", "a"), {"data": {b"etc": BEFORE}})


async def test_the_answer_is_the_same_whatever_happened(finder: Finder) -> None:
    repository = finder.repository
    await repository.create_namespace(Namespace.parse("a"))
    assert await finder.agrees() == 0
    await fill(finder)
    assert await finder.agrees(patterns=PATTERNS) > 40
    await repository.forget(at(2))
    await repository.forget(at(2, "host/db"))
    await store_trees(repository, at(9), {"root": BEFORE, "etc": {}})
    assert await finder.agrees() > 40
    # Of the same name, with other files.
    await repository.forget(at(9))
    await store_trees(repository, at(9), {"root": {**BEFORE, b"other.docx": (b"", 1)}, "etc": {}})
    assert await finder.agrees() > 40
    assert "/other.docx" in str(await finder.find("*.docx"))
    await repository.delete_namespace(Namespace.parse("a"), groups=True)
    await repository.create_namespace(Namespace.parse("a"))
    for snapshot in (at(1), at(4), at(9)):
        await repository.forget(snapshot)
    assert await finder.agrees() > 0
    await repository.forget(at(3))
    assert await finder.agrees() == 0
    with closing((await finder.file()).open()) as connection:
        assert set(Records(connection).counts().values()) == {0}


async def test_named_snapshots_and_groups_use_what_is_indexed_and_add_nothing(finder: Finder) -> None:
    await fill(finder)
    everywhere = [["host/web"], [str(at(1)), "host/web"], [str(at(4))], ["host/db", "host/web"], []]
    for known in (False, True):
        for named in everywhere:
            for archive in (None, "root.pxar"):
                more = {"everything": False, "archive": archive if not named or "host/db" not in named else None}
                direct = await finder.find("*o*", *named, index=False, **more)  # type: ignore[arg-type]
                assert await finder.find("*o*", *named, **more) == direct  # type: ignore[arg-type]
        assert (await finder.file()).exists() is known
        if not known:
            await finder.find("x", recursive=True)


async def test_an_archive_that_no_snapshot_has_is_no_answer_without_a_word(finder: Finder) -> None:
    await fill(finder)
    for archive, more in (("rot", ""), ("disk.img", "; disk images are looked into with --images")):
        for index in (False, True):
            found, warnings = await finder.find("hosts", archive=archive, index=index)
            assert found == []
            assert warnings == [f"none of the snapshots has an archive {archive} that could be looked into{more}"]
    # Some have it: nothing is wrong; with nothing to be found in it neither.
    assert (await finder.find("nothing", archive="etc"))[1] == []


async def test_what_is_indexed_is_not_read_again(finder: Finder) -> None:
    await fill(finder)
    direct = await finder.find("*o*", index=False)
    done = await finder.update()
    assert (done.indexed, done.archives, done.removed, done.left_out) == (6, 8, 0, {})
    assert (await finder.update()) == Updated()
    await store_trees(finder.repository, at(5), {"root": AFTER})
    done = await finder.update()
    assert (done.indexed, done.archives) == (1, 0)  # the metadata archive is one that was gone through
    await finder.repository.forget(at(5))
    for chunk in chunk_files(finder.folder):
        chunk.unlink()
    assert await finder.find("*o*") == direct
    assert len((await finder.find("*o*", index=False))[1]) >= 5
    await finder.repository.set_notes(at(1), "notes change the manifest, and nothing of its archives")
    await finder.repository.set_protected(at(3), protected=True)
    assert await finder.find("*o*") == direct


async def test_damaged_snapshots_are_warned_of_each_time_and_not_indexed(finder: Finder) -> None:
    await fill(finder)
    base = finder.folder
    (base / at(3).path / "catalog.pcat1.didx").unlink()
    (base / at(1).path / "etc.mpxar.didx").unlink()
    for _ in range(2):
        direct = await finder.find("*o*", index=False)
        assert len(direct[1]) >= 2
        assert await finder.find("*o*") == direct
    done = await finder.update()
    assert set(done.left_out) == {at(1), at(3)}


async def test_an_archive_in_no_order_is_read_itself(finder: Finder) -> None:
    tree: Tree = {b"b": {b"y": (b"", 1), b"x.docx": (b"", 1)}, b"a.docx": (b"", 1)}
    await store_trees(finder.repository, at(1), {"root": tree})
    await store_trees(finder.repository, at(2), {"root": BEFORE})
    await finder.agrees()
    assert [one.path for one in (await finder.find("*.docx"))[0]][:2] == [b"/b/x.docx", b"/a.docx"]
    assert (await finder.update()) == Updated()  # it is known to be so, and not tried again
    status = await index_status(finder.repository, await finder.repository.snapshots(), ChunkCodec())
    assert (status["snapshots"], status["not-indexed"], status["states"]) == (2, 1, 1)


# The file.


@pytest.fixture
def other_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    return lambda: monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "elsewhere"))


async def test_nobody_else_may_read_it(finder: Finder, state: Path) -> None:
    await fill(finder)
    state.mkdir()
    (state / "find-index").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        await finder.update()
    finally:
        os.umask(before)
    assert stat.S_IMODE((state / "find-index").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state / "find-index").iterdir()} == {0o600}
    path = (await finder.file()).path
    path.chmod(0o666)
    await finder.find("x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version=77")


def _trigger(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TRIGGER bad AFTER INSERT ON snapshot BEGIN DELETE FROM entry; END")


def _view(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE part")
        connection.execute("CREATE VIEW part AS SELECT 1 AS snapshot, 0 AS position, 'x' AS archive")
        connection.commit()


def _link(path: Path) -> None:
    target = path.with_name("victim")
    path.rename(target)
    path.symlink_to(target)


def _folder(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def _foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE about SET value='folder /another' WHERE key='repository'")
        connection.commit()


def _wrong(sql: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(sql)
            connection.commit()

    return change


HOSTILE: dict[str, Callable[[Path], None]] = {
    "garbage": _garbage, "empty": _empty, "half": _half, "version": _version, "trigger": _trigger, "view": _view,
    "link": _link, "folder": _folder, "foreign": _foreign,
    "kind": _wrong("UPDATE entry SET kind=99"), "size": _wrong("UPDATE entry SET size='much'"),
    "run": _wrong("UPDATE entry SET last=0"),
    "no directory": _wrong("DELETE FROM dir WHERE parent IS NOT NULL"),
    "cycle": _wrong("UPDATE dir SET parent=id WHERE parent IS NOT NULL"), "no state": _wrong("DELETE FROM state"),
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_a_file_that_is_none_of_ours_is_made_anew(finder: Finder, hostile: str) -> None:
    await store_trees(finder.repository, at(1), {"root": BEFORE})
    await store_trees(finder.repository, at(2), {"root": AFTER})
    direct = await finder.find("hosts", index=False)
    assert await finder.find("hosts") == direct
    file = await finder.file()
    HOSTILE[hostile](file.path)
    for named in (["host/web"], []):
        assert await finder.find("hosts", *named) == direct
    assert file.path.is_file()
    assert not file.path.is_symlink()
    # It is right again, and used: without the data the answer is there.
    for chunk in chunk_files(finder.folder):
        chunk.unlink()
    if hostile != "run":  # entries that are in no snapshot are not seen
        assert await finder.find("hosts") == direct


async def test_flipped_bits_never_end_in_anything_but_an_answer_or_an_error(finder: Finder) -> None:
    await fill(finder)
    await finder.update()
    file = await finder.file()
    whole = file.path.read_bytes()
    for step in range(12):
        data = bytearray(whole)
        for place in range(step * 97, len(data), len(data) // 3):
            data[place] ^= 1 << step % 8
        file.path.write_bytes(data)
        for pattern in ("hosts", "**"):
            found, _ = await finder.find(pattern, recursive=True)
            assert all(isinstance(one, Found) for one in found)


async def test_where_the_index_cannot_be_written_the_archives_are_read(
    finder: Finder, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(finder)
    direct, _ = await finder.find("*o*", index=False)
    state.mkdir()
    (state / "find-index").write_text("in the way")
    found, (warning,) = await finder.find("*o*")
    assert (found, "the archives are read themselves" in warning) == (direct, True)
    (state / "find-index").unlink()

    prepare = IndexFile._prepare

    def small(self: IndexFile, connection: sqlite3.Connection, make: bool) -> None:
        prepare(self, connection, make)
        connection.execute("PRAGMA max_page_count=18")

    monkeypatch.setattr(IndexFile, "_prepare", small)
    await store_trees(finder.repository, at(20), {"root": {b"%0200d" % one: (b"", 1) for one in range(500)}})
    found, (warning,) = await finder.find("*o*")
    assert (found, "full" in warning) == (direct, True)
    monkeypatch.undo()


async def test_who_cannot_update_it_meanwhile_reads_the_rest_directly(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(finder)
    await finder.update()
    await store_trees(finder.repository, at(20), {"root": BEFORE})
    waits = answering.update_index.__kwdefaults__
    assert waits is not None
    monkeypatch.setitem(waits, "wait_s", 0.0)
    direct = await finder.find("*o*", index=False)
    file = await finder.file()
    async with file.locked(0) as held:
        assert held
        async with file.locked(0) as second:
            assert not second
        assert await finder.find("*o*") == direct
        status = await index_status(finder.repository, await finder.repository.snapshots(), ChunkCodec())
        assert status["not-indexed"] == 1
    assert await finder.find("*o*") == direct
    status = await index_status(finder.repository, await finder.repository.snapshots(), ChunkCodec())
    assert status["not-indexed"] == 0


#: Brings an index up to date and is killed at an entry, a row after the other being made durable.
_KILLED = """
import os, signal, sys, trio
from agent.find_index import writing
from repository.local import open_local
from tests.support.cache import ROOT
from tests.support.finder import Finder

writing._BATCH = writing._COMMIT = 1
add, left = writing.StateWriter.add, int(sys.argv[2])

def dying(self, one):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, one)

writing.StateWriter.add = dying

async def run():
    await Finder(await open_local(sys.argv[1], name="main")).update()

trio.run(run)
"""


async def test_a_process_that_is_killed_in_the_middle_leaves_an_index_that_is_right(finder: Finder) -> None:
    await fill(finder)
    for entries in (2, 14):
        line = [sys.executable, "-c", _KILLED, str(finder.folder), str(entries)]
        done = await trio.run_process(line, check=False, cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        with closing((await finder.file()).open()) as connection:
            ((unfinished,),) = connection.execute("SELECT count(*) FROM state WHERE complete=0")
            assert unfinished > 0
    assert await finder.agrees() > 40


def test_processes_at_the_same_time_give_the_same_answer(stored: Fleece, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "hosts").touch()
    for day in (1, 2, 3):
        time = f"2026-01-0{day}T00:00:00Z"
        stored.json("backup", f"etc.pxar:{tmp_path}/etc", "--backup-id", "web", "--backup-time", time)
    direct = stored.json("find", "hosts", "--all-snapshots", "--no-index")
    assert len(direct) == 3
    processes = [stored.start("find", "hosts", "--all-snapshots", "--output", "json") for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err, json.loads(out)) == (0, "", direct)


def test_the_commands_tell_what_is_there(stored: Fleece, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    stored.json("backup", f"etc.pxar:{tmp_path}/etc", "--backup-id", "web")
    status = stored.json("index", "status")
    assert (status["state"], status["not-indexed"]) == ("none", 1)
    built = stored.json("index", "build")
    assert (built["indexed"], built["removed"], built["entries-read"], built["left-out"]) == (1, 0, 0, [])
    assert Path(built["path"]).is_file()
    text = stored("index", "status", "-q").out.splitlines()
    assert text[0] == built["path"]
    assert "  not indexed: 0 snapshots" in text
    assert stored("index", "build", "--encrypted").code == 2
    assert stored.json("index", "remove") == {"removed": [built["path"]]}
    assert stored("index", "remove", "--all").out == "there is none\n"


async def test_an_index_is_removed_and_made_anew(finder: Finder) -> None:
    await fill(finder)
    file = await finder.file()
    with pytest.raises(NoIndexError):
        file.open()
    assert await remove_index(file.folder) == []
    await finder.update()
    assert (await finder.update(rebuild=True)).indexed == 6
    assert await remove_index(file.folder) == [file.path]
    assert not file.exists()
    await finder.update()
    assert await remove_index(file.folder, file) == [file.path]
    assert [path.name for path in file.folder.iterdir()] == [file.path.with_suffix(".lock").name]


# Keys.


def _key(byte: int) -> CryptKey:
    return CryptKey(bytes([byte]) * 32)


def on_disk(file: IndexFile) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(file.folder.iterdir()))


async def test_names_of_encrypted_archives_are_written_only_if_that_is_allowed(finder: Finder) -> None:
    key, other = _key(1), _key(2)
    codec = ChunkCodec(key, CryptMode.ENCRYPT)
    secret: Tree = {b"secret-name": {b"hosts": (b"", 1)}}
    await store_trees(finder.repository, at(1), {"root": BEFORE})
    await store_trees(finder.repository, at(2), {"root": secret}, codec=codec)
    await store_trees(finder.repository, at(3), {"root": secret, "etc": secret}, codec=codec, catalog=True)
    file = await finder.file()
    for one in (None, key, other):
        await finder.agrees(one)
        assert b"secret-name" not in on_disk(file)
    assert b"sshd.conf" in on_disk(file)

    assert (await finder.update(key, encrypted=True)).archives == 3
    assert b"secret-name" in on_disk(file)
    for one in (key, None, other, key):
        await finder.agrees(one)
    assert len((await finder.find("secret-name", key=key))[0]) == 3
    for one in (None, other):
        found, warnings = await finder.find("secret-name", key=one)
        assert (found, len(warnings)) == ([], 2)
    # With the key nothing is read again, whoever asked without it meanwhile.
    assert (await finder.update(key)).archives == 0
    assert (await finder.update(key, rebuild=True)).archives == 4  # the permission stays
    assert b"secret-name" in on_disk(file)

    await finder.update(key, encrypted=False)
    assert b"secret-name" not in on_disk(file)
    await finder.agrees(key)
    assert b"secret-name" not in on_disk(file)


async def test_doubts_about_signatures_are_told_as_without_the_index(finder: Finder) -> None:
    signer, other = _key(1), _key(2)
    await store_trees(finder.repository, at(1), {"root": BEFORE}, codec=ChunkCodec(signer, CryptMode.SIGN_ONLY))
    await store_trees(finder.repository, at(2), {"root": AFTER})
    for key in (None, signer, other, None, other, signer):
        await finder.agrees(key)
    assert len((await finder.find("hosts", key=other))[1]) == 1
    for chunk in chunk_files(finder.folder):
        chunk.unlink()
    assert len((await finder.find("hosts", key=other))[0]) == 4


def test_errors_say_what_they_are() -> None:
    path = Path("/x.sqlite")
    assert isinstance(NoIndexError(path), IndexFileError)
    assert str(DamagedIndexError(path, "why")) == "cannot use the index /x.sqlite: why"
