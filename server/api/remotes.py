"""Remotes: their list, and what is on them (spec 6.11)."""

import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from core.errors import FleeceError
from core.limits import in_io_thread
from repository.remote.errors import RemoteRefusedError
from repository.remote.repository import RemoteRepository
from server.access.roles import Privilege
from server.answers import Result, digest_of
from server.api.sync_jobs import jobs_of
from server.errors import ApiError
from server.remotes import no_remote
from server.routing import Call, Endpoint, Needs
from server.schema import (
    AUTH,
    COMMENT,
    CONFIG_DIGEST,
    NAMESPACE,
    REMOTE,
    STORE,
    Array,
    Integer,
    Parameter,
    Text,
    optional,
    parameter_error,
)

_P = Privilege
_HOST: Final = Text(re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.\-_]*[A-Za-z0-9])?|\[?[0-9A-Fa-f:.]+\]?"), 1, 253)
_FINGERPRINT: Final = Text(re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){31}"))
_PASSWORD: Final = Text(re.compile(r"[^\x00-\x1f\x7f]+"), 1, 1024)
_OPTIONAL: Final = ("port", "fingerprint", "comment")
_MODIFIED: Final = "detected modified configuration - file changed by other user? Try again."


async def _listed(call: Call) -> Mapping[str, Mapping[str, Any]]:
    return await in_io_thread(call.state.remotes.listed)


async def _checked(call: Call) -> None:
    """See to it that the remote of a call is there, and that the caller knows the list as it is."""
    found = await _listed(call)
    if call["digest"] is not None and call["digest"].lower() != digest_of(found):
        raise ApiError(_MODIFIED)
    if call["name"] not in found:
        raise no_remote(call["name"])


async def remotes(call: Call) -> object:
    """`GET /config/remote`."""
    found = await _listed(call)
    seen = [
        {"name": name, **values}
        for name, values in found.items()
        if call.state.privileges(call.caller, ("remote", name)) & _P.REMOTE_AUDIT
    ]
    return Result(seen, {"digest": digest_of(found)})


async def remote(call: Call) -> object:
    """`GET /config/remote/{name}`."""
    found = await _listed(call)
    if call["name"] not in found:
        raise no_remote(call["name"])
    return Result({"name": call["name"], **found[call["name"]]}, {"digest": digest_of(found)})


async def add(call: Call) -> None:
    """`POST /config/remote`."""
    name = call["name"]
    if name in await _listed(call):
        raise parameter_error([("name", f"remote '{name}' already exists.")])
    values = {key: call[key] for key in ("host", "auth-id", *_OPTIONAL) if call[key] is not None}
    await in_io_thread(call.state.remotes.add, name, values, call["password"])


async def update(call: Call) -> None:
    """`PUT /config/remote/{name}`: what is not named stays."""
    await _checked(call)
    changes: dict[str, Any] = dict.fromkeys(call["delete"] or ())
    changes |= {key: call[key] for key in ("host", "auth-id", *_OPTIONAL) if call[key] is not None}
    await in_io_thread(call.state.remotes.update, call["name"], changes, call["password"])


async def remove(call: Call) -> None:
    """`DELETE /config/remote/{name}`."""
    await _checked(call)
    jobs = await in_io_thread(jobs_of, call.state)
    for id, job in jobs.items():
        if job.get("remote") == call["name"]:
            raise parameter_error([("name", f"remote '{call['name']}' is used by sync job '{id}'")])
    await in_io_thread(call.state.remotes.remove, call["name"])


async def _ask(call: Call, store: str, path: str, parameters: dict[str, str], *keys: str) -> list[dict[str, Any]]:
    """A list of the remote.

    Raises:
        ApiError: the remote refuses, cannot be reached, or answers with something else.
    """
    if call["name"] not in await _listed(call):
        raise no_remote(call["name"])
    opened: AbstractAsyncContextManager[RemoteRepository] = call.state.remotes.open(call["name"], store, {})
    try:
        async with opened as repository:
            found = await repository.server.call("GET", path, parameters, what="look at", where=call["name"])
    except RemoteRefusedError as error:
        raise ApiError(f"remote '{call['name']}' refuses: {error.why}") from error
    except FleeceError as error:
        raise ApiError(f"remote connection to '{call['name']}' failed - {error}") from error
    is_list = isinstance(found, list) and all(isinstance(one, dict) for one in found)
    if not is_list or not all(isinstance(one.get(key), str) for one in found for key in keys):
        raise ApiError(f"remote '{call['name']}' answers with something else than a list")
    return list(found)


async def scan(call: Call) -> object:
    """`GET /config/remote/{name}/scan`: its datastores."""
    return await _ask(call, "any", "//admin/datastore", {}, "store")


async def scan_groups(call: Call) -> object:
    """`GET /config/remote/{name}/scan/{store}/groups`."""
    ns = {"ns": call["namespace"]} if call["namespace"] else {}
    return await _ask(call, call["store"], "/groups", ns, "backup-type", "backup-id")


async def scan_namespaces(call: Call) -> object:
    """`GET /config/remote/{name}/scan/{store}/namespaces`."""
    return await _ask(call, call["store"], "/namespace", {}, "ns")


_BASE: Final = "/config/remote"
_NAME: Final = {"name": Parameter(REMOTE)}
_AUDIT: Final = Needs(_P.REMOTE_AUDIT, "/remote/{name}")
_MODIFY: Final = Needs(_P.REMOTE_MODIFY, "/remote/{name}")
_DIGEST: Final = {"digest": optional(CONFIG_DIGEST)}
_MORE: Final = {
    "port": optional(Integer(1, 65535)),
    "fingerprint": optional(_FINGERPRINT),
    "comment": optional(COMMENT),
}
_IN_STORE: Final = {**_NAME, "store": Parameter(STORE)}
ENDPOINTS: Final = (
    Endpoint("GET", _BASE, remotes),
    Endpoint(
        "POST",
        _BASE,
        add,
        {**_NAME, "host": Parameter(_HOST), "auth-id": Parameter(AUTH), "password": Parameter(_PASSWORD), **_MORE},
        Needs(_P.REMOTE_MODIFY, "/remote"),
    ),
    Endpoint("GET", f"{_BASE}/{{name}}", remote, _NAME, _AUDIT),
    Endpoint(
        "PUT",
        f"{_BASE}/{{name}}",
        update,
        {
            **_NAME, "host": optional(_HOST), "auth-id": optional(AUTH), "password": optional(_PASSWORD), **_MORE,
            "delete": optional(Array(Text(choices=_OPTIONAL))), **_DIGEST,
        },
        _MODIFY,
    ),
    Endpoint("DELETE", f"{_BASE}/{{name}}", remove, {**_NAME, **_DIGEST}, _MODIFY),
    Endpoint("GET", f"{_BASE}/{{name}}/scan", scan, _NAME, _AUDIT),
    Endpoint(
        "GET", f"{_BASE}/{{name}}/scan/{{store}}/groups", scan_groups, {**_IN_STORE, "namespace": optional(NAMESPACE)},
        _AUDIT,
    ),
    Endpoint("GET", f"{_BASE}/{{name}}/scan/{{store}}/namespaces", scan_namespaces, _IN_STORE, _AUDIT),
)  # fmt: skip
