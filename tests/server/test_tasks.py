"""The registry of tasks: full disks, killed servers, a second server, hostile texts, logs of others."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from server import tasks as tasks_module
from server.errors import ApiError, ServerError
from server.tasks import ABORTED, OK, UNKNOWN, Task, TaskFiles, Tasks
from tests.support.direct_server import Direct

UPID = "UPID:host:00000001:00000001:0000000{}:00000001:backup:main:a@pbs:"


@pytest.fixture
async def tasks(tmp_path: Path) -> AsyncIterator[Tasks]:
    tasks = Tasks(tmp_path / "tasks")
    async with tasks.running():
        yield tasks


def full(*_: object) -> Any:
    raise OSError(28, "No space left on device")


async def nothing(task: Task) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_full_disk_does_not_end_the_work_nor_keep_the_task(
    tasks: Tasks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with tasks.task("backup", "main:host/a", "a@pbs") as task:
        task.log("before")
        descriptor = os.open("/dev/full", os.O_WRONLY)
        os.dup2(descriptor, task._file.fileno())
        os.close(descriptor)
        monkeypatch.setattr(tasks.files, "note", full)
        task.log("lost")
        task.log("lost, too")
    assert tasks.busy == 0
    assert [info.status for info in tasks.infos()] == [OK]
    assert caplog.text.count("cannot be written: No space left on device") == 1
    # Nothing can be begun, which is said, and nothing of it stays.
    with pytest.raises(ServerError, match="cannot start the task backup main:host/b: No space left"):
        async with tasks.task("backup", "main:host/b", "a@pbs"):
            raise AssertionError
    with pytest.raises(ServerError, match="cannot start the task"):
        await tasks.start("verify", "main", "a@pbs", nothing)
    assert tasks.busy == 0
    assert len(tasks.infos()) == 1
    assert len(list(tasks.files.folder.glob("log/*/*"))) == 1


def test_a_line_that_a_killed_server_did_not_end_is_the_only_one_that_is_lost(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path)
    one, two = UPID.format(1), UPID.format(2)
    files.note(f"S {one}")
    with (tmp_path / "index").open("a") as file:
        file.write(f"E {one} 5")
    files.note(f"S {two}")
    files.note(f"E {two} 6 OK")
    assert {upid: task.status for upid, task in files.load().items()} == {one: None, two: OK}


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = TaskFiles(tmp_path)
    files.note("S a")
    write = os.write
    calls: list[int] = []

    def almost_full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        return write(descriptor, data[:3]) if len(calls) == 1 else full()

    monkeypatch.setattr("server.tasks.os.write", almost_full)
    with pytest.raises(OSError, match="No space"):
        files.note("S bbbbbbb")
    assert (tmp_path / "index").read_text() == "S a\n"


async def test_tasks_of_a_killed_server_end_as_unknown_and_keep_their_logs(tmp_path: Path) -> None:
    files = TaskFiles(tmp_path)
    upid = UPID.format(1)
    files.note(f"S {upid}")
    assert files.listed()[upid].status == UNKNOWN
    tasks = Tasks(tmp_path)
    async with tasks.running():
        assert files.server_runs()
        info = tasks.info(upid)
        assert info is not None
        assert (info.status, info.end is not None) == (UNKNOWN, True)
        async with tasks.task("backup", "main:host/a", "a@pbs") as task:
            assert files.listed()[str(task)].status is None
            with pytest.raises(ServerError, match="another 'fleece serve' uses it"):
                async with Tasks(tmp_path).running():
                    raise AssertionError
            assert files.listed()[str(task)].status is None
    assert not files.server_runs()


async def test_what_a_client_says_makes_no_line_and_speaks_to_no_terminal(tasks: Tasks) -> None:
    async with tasks.task("backup", "main:host/a", "a@pbs") as task:
        task.log("GET /x\r2026-01-01T00:00:00+00:00: TASK OK\x1b[2J\x85\u2028 ä\tb\nsecond")
    lines, total = tasks.files.log_lines(str(task))
    assert total == 3
    assert lines[0][27:] == "GET /x\\x0d2026-01-01T00:00:00+00:00: TASK OK\\x1b[2J\\x85\\x2028 ä\tb"
    assert lines[1].endswith(": second")


async def test_the_list_does_not_grow_for_ever(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "KEPT", 3)
    upids = []
    for _ in range(20):
        async with tasks.task("backup", "main:host/a", "a@pbs") as task:
            upids.append(str(task))
    assert [str(info.upid) for info in tasks.infos()] == upids[:-4:-1]
    assert len((tasks.files.folder / "index").read_text().splitlines()) <= 6 * 3 + 1
    assert list(tasks.files.load())[-3:] == upids[-3:]


async def test_only_so_many_tasks_are_started(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "MAX_STARTED", 2)

    async def work(task: Task) -> None:
        await trio.sleep_forever()

    upid = await tasks.start("verify", "main", "a@pbs", work)
    await tasks.start("verify", "main", "a@pbs", work)
    with pytest.raises(ApiError, match="2 tasks are running already"):
        await tasks.start("verify", "main", "a@pbs", work)
    task = tasks.get(upid)
    assert task is not None
    task.stop()
    await task.over.wait()
    await trio.testing.wait_all_tasks_blocked()
    await tasks.start("verify", "main", "a@pbs", work)
    info = tasks.info(upid)
    assert info is not None
    assert info.status == ABORTED


@pytest.mark.parametrize(("start", "limit", "shown"), [
    (0, 0, range(1, 31)), (5, 0, range(5, 31)), (99, 0, range(0)), (3, 20, range(3, 23)), (25, 25, range(25, 31)),
    (2, 4, range(2, 6)), (99, 4, range(0)),
])  # fmt: skip
async def test_any_part_of_a_log_is_shown_with_little_in_memory(
    start: int, limit: int, shown: range, direct: Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.tasks._LINES", 7)
    async with direct.state.tasks.task("backup", "main:host/a", "root@pam") as task:
        for number in range(1, 30):
            task.log(f"line {number}")
    path = f"/nodes/localhost/tasks/{str(task).replace(chr(92), '%5C')}/log"
    got = await direct.call("GET", path, query={"start": start, "limit": limit, "test-status": 1})
    document = json.loads(got.body)
    assert (document["total"], document["success"], document["active"]) == (30, 1, False)
    assert [line["n"] for line in document["data"]] == list(shown)
    for line in document["data"][:-1]:
        assert line["t"].endswith(f": line {line['n']}")
    whole = await direct.call("GET", path, query={"download": 1})
    assert (whole.content_type, len(whole.text.splitlines())) == ("text/plain", 30)


@pytest.mark.parametrize(("kind", "worker_id", "place"), [
    ("verify", "main:ns/a/ns/b", ("a", "b")), ("verify", "main", ()), ("verify_group", "main:ns/a/vm/100", ("a",)),
    ("verify_snapshot", "main:/vm/100/00000001", ()), ("prune", "main:a/b:vm/100", ("a", "b")), ("prune", "main:", ()),
])  # fmt: skip
async def test_who_may_not_see_a_namespace_does_not_read_logs_about_it(
    kind: str, worker_id: str, place: tuple[str, ...], direct: Direct
) -> None:
    direct.right("/datastore/main", "u@pbs", "DatastoreAdmin")
    for hidden in ("/datastore/main/a", "/datastore/main/a/b"):
        direct.right(hidden, "u@pbs", "NoAccess")
    async with direct.state.tasks.task(kind, worker_id, "root@pam") as task:
        pass
    path = f"/nodes/localhost/tasks/{str(task).replace(chr(92), '%5C')}/log"
    got = await direct.call("GET", path, "u@pbs")
    assert (got.status == 400) is bool(place), got.text
