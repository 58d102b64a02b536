"""The calls of a push and a pull beside those that a real server made, as far as order and names go."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from datastore.names import Group
from tests.repository.sync.conftest import Pair
from tests.support.pbs_double import PbsDouble
from tests.support.remote import remote
from tests.support.snapshots import CODEC, write_snapshot
from tests.support.syncs import SERVER_CHUNK, pull, push

#: Asked by every session of ours, and by no push of PBS.
OURS = "GET previous_backup_time"
FILES = {
    "drive-scsi0.img.fidx": bytes([1]) * SERVER_CHUNK + bytes([2]) * SERVER_CHUNK,
    "drive-scsi1.img.fidx": bytes([3]) * SERVER_CHUNK + b"tail",
    "qemu-server.conf.blob": b"name: x",
}


def scenario(golden: Path, file: str, name: str) -> list[str]:
    """What was asked in a scenario, in the order in which requests began; several of a kind in a row count once."""
    (found,) = [one for one in json.loads((golden / "wire" / file).read_text()) if one["scenario"] == name]
    requests: list[dict[str, Any]] = []
    for connection in found["connections"]:
        requests += connection["http1"] + connection.get("http2", [])
    requests.sort(key=lambda request: request["order"][0])
    return [call for call, _ in groupby(_call(request["method"], request["path"]) for request in requests)]


def asked(double: PbsDouble) -> list[str]:
    """The same of the double."""
    calls = (_call(one.method, one.path) for one in double.asked)
    return [call for call, _ in groupby(call for call in calls if call != OURS)]


def _call(method: str, path: str) -> str:
    return f"{method} {path.rpartition('/')[2]}"


async def two_snapshots(pair: Pair) -> None:
    """As the scenario has them: nothing changed in the second one, and the first one has a log."""
    for ctime in (1000, 2000):
        await write_snapshot(pair.source, "vm/100", ctime, FILES, chunk_size=SERVER_CHUNK)
    await pair.source.upload_log(Group.parse("vm/100").at(1000), CODEC.encode_blob(b"log"))


async def test_a_push_asks_what_the_real_one_asked(pair: Pair, golden: Path) -> None:
    await two_snapshots(pair)
    double = PbsDouble()
    async with remote(double) as target:
        assert (await push(pair.source, target)).failed == {}
    assert asked(double) == scenario(golden, "push.json", "push1")


async def test_a_push_with_nothing_to_do_asks_what_the_real_one_asked(pair: Pair, golden: Path) -> None:
    await two_snapshots(pair)
    double = PbsDouble()
    async with remote(double) as target:
        await push(pair.source, target)
    double.asked.clear()
    async with remote(double) as target:
        await push(pair.source, target)
    assert asked(double) == scenario(golden, "push.json", "push2")


async def test_a_pull_of_a_group_asks_what_the_real_one_asked(pair: Pair, golden: Path) -> None:
    await two_snapshots(pair)
    double = PbsDouble()
    async with remote(double) as far:
        await push(pair.source, far, transfer_last=1)
        double.asked.clear()
        assert (await pull(far, pair.target)).failed == {}
    calls = scenario(golden, "pull.json", "pull1")
    # The real one went through several groups; the last one of its first namespace is such a machine.
    begin = max(at for at, call in enumerate(calls) if call == "GET groups" and at < 5)
    machine = calls[: begin + 1] + _last_group(calls)
    assert asked(double) == machine


def _last_group(calls: list[str]) -> list[str]:
    """From the last `GET snapshots` with two images behind it to the end of that snapshot."""
    ends = [at for at, call in enumerate(calls) if call == "GET groups"]
    end = ends[1]
    begin = max(at for at, call in enumerate(calls[:end]) if call == "GET snapshots")
    return calls[begin:end]
