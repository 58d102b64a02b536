"""The sessions that a test program had with a real PBS, replayed: status, JSON and error texts are the same."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from datastore.blob import Blob, BlobKind
from server.access.auth_ids import AuthId
from tests.support.direct_server import Direct, Got

CHECKS = Path(os.environ.get("FLEECE_GOLDEN") or Path(__file__).parents[3] / "shared/golden") / "wire/checks.json"
pytestmark = pytest.mark.skipif(not CHECKS.exists(), reason="no golden data (FLEECE_GOLDEN)")
#: Texts with paths or debug forms of PBS, and what Fleece decides otherwise on purpose.
LOOSE = ("Unable to open", "open file", "unable to read", "Atomic rename", "unable to update manifest", "while ")


def load() -> list[dict[str, Any]]:
    found = json.loads(CHECKS.read_text()) if CHECKS.exists() else []
    return [one for one in found if isinstance(one, dict)]


SESSIONS = [
    one for one in load() if one.get("upgrade") == "backup" and isinstance(one.get("requests"), list)
    and one["query"]["backup-id"] == "c1" and one["query"]["backup-time"] == 1767225600
]  # fmt: skip
#: What needs nothing that earlier sessions left.
BEFORE_ANY_SNAPSHOT = (
    "missing permissions", "no permissions", "parameter", "invalid protocol", "missing Upgrade", "namespace not found",
    "benchmark", "unable to run benchmark", "snapshot host", "authentication",
)  # fmt: skip
REFUSED = [
    one for one in load() if "upgrade" in one and "requests" not in one and one["status"] != 101
    and one["text"].startswith(BEFORE_ANY_SNAPSHOT) and "wrong secret" not in one["user"]
]  # fmt: skip


def rebuilt(request: dict[str, Any]) -> bytes | None:
    """The body of a request, if it can be told from its digest; None otherwise."""
    query = request.get("query") or {}
    if "body" not in request:
        return b""
    size = query.get("size")
    for fill in [bytes([number]) for number in range(256)] + [b"12345"]:
        data = fill * (size or 0) if len(fill) == 1 else fill
        if size is not None and hashlib.sha256(data).hexdigest() == query.get("digest"):
            return bytes(Blob.make(BlobKind.PLAIN, data))
    return None


def same(got: Got, wanted: dict[str, Any]) -> None:
    assert got.status == wanted["status"], (wanted, got.body[:300])
    expected = wanted.get("response") or {}
    if "json" in expected:
        assert json.loads(got.body) == expected["json"]
    elif "text" in expected and not expected["text"].startswith(LOOSE):
        assert got.text == expected["text"]


@pytest.mark.parametrize("number", range(len(SESSIONS)))
async def test_backup_session(number: int, direct: Direct, no_delays: None) -> None:
    direct.right("/datastore/main", "t@pbs", "DatastoreAdmin")
    session = SESSIONS[number]
    compared = 0
    names: set[str] = set()
    async with direct.session("backup", "t@pbs", {**session["query"], "store": "main"}) as opened:
        for request in session["requests"]:
            if not isinstance(request, dict):
                break
            body = rebuilt(request)
            query = request.get("query") or {}
            name = query.get("archive-name")
            if body is None or (name in names and request["method"] == "POST"):
                break  # a body that nobody can rebuild; or a second writer for one name, which Fleece refuses
            if name is not None and request["status"] == 200:
                names.add(name)
            got = await opened.call(request["method"], request["path"], query, json_body=request.get("json"), body=body)
            if request["path"] == "/":
                assert got.data == request["response"]["json"]["data"]
            same(got, request)
            compared += 1
    assert compared >= 1


def test_sessions_are_there() -> None:
    assert len(SESSIONS) >= 3
    assert len(REFUSED) >= 18


@pytest.mark.parametrize("number", range(len(REFUSED)))
async def test_refused_upgrade(number: int, direct: Direct, no_delays: None) -> None:
    one = REFUSED[number]
    direct.right("/datastore/main", "t@pbs", "DatastoreAdmin")
    direct.right("/datastore/main", "u2@pbs", "DatastorePowerUser")
    user = None if one["user"] == "none" else str(AuthId(one["user"].partition("!")[0].partition(" ")[0]))
    query = {**one["query"]}
    text = one["text"]
    if query.get("store") == "wire":
        query["store"] = "main"
    got = await direct.refusal(one["upgrade"], user, query, protocol=one.get("protocol"))
    assert (got.status, got.text) == (one["status"], text)
