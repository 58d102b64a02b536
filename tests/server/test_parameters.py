"""Wrong parameters for every call, generated from the table of calls."""

from collections.abc import Iterator
from typing import Any

import pytest

from server.application import ENDPOINTS
from server.backup_calls import BackupCalls
from server.errors import ApiError
from server.routing import Endpoint, parameters
from server.schema import Array, Boolean, Integer, Parameter, Text

GOOD = {
    "store": "main", "ns": "a/b", "parent": "a", "backup-type": "vm", "backup-id": "100", "username": "u@pbs",
    "userid": "u@pbs", "new-owner": "u@pbs", "auth-id": "u@pbs", "path": "/datastore/main", "digest": "0" * 64,
    "reuse-csum": "0" * 64, "csum": "0" * 64, "role": "Audit", "file-name": "a.blob", "archive-name": "a.fidx",
    "owner": "u@pbs", "fingerprint": ":".join(["00"] * 32),
    "upid": "UPID:vm:00000001:00000001:00000001:00000001:backup:main:u@pbs:",
}  # fmt: skip
PATHS = ["../x", "a/../b", "/etc/passwd", ".hidden", "a\x00b", "a\nb", "ä", "%2e%2e", "a b"]
SESSION = BackupCalls.routes(object.__new__(BackupCalls)).endpoints
ALL = [*ENDPOINTS, *SESSION]


def good(name: str, parameter: Parameter) -> str:
    kind = parameter.type.item if isinstance(parameter.type, Array) else parameter.type
    if name in GOOD:
        return GOOD[name]
    match kind:
        case Integer():
            return str(max(1, kind.least or 1))
        case Boolean():
            return "1"
        case Text():
            return kind.choices[0] if kind.choices else "abcd" if name != "digest-list" else "0" * 64
    raise AssertionError


def values(endpoint: Endpoint) -> tuple[dict[str, str], list[tuple[str, str]]]:
    in_path = {part[1:-1] for part in endpoint.path.split("/") if part.startswith("{")}
    path = {name: good(name, one) for name, one in endpoint.schema.items() if name in in_path}
    return path, [(name, good(name, one)) for name, one in endpoint.schema.items() if name not in in_path]


def parse(endpoint: Endpoint, path: dict[str, str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    from urllib.parse import urlencode

    return parameters(endpoint, path, urlencode(pairs, encoding="utf-8"), None, b"")


def cases() -> Iterator[Any]:
    for endpoint in ALL:
        yield pytest.param(endpoint, id=f"{endpoint.method} {endpoint.path}")


@pytest.mark.parametrize("endpoint", list(cases()))
def test_every_call_takes_good_parameters_and_names_each_wrong_one(endpoint: Endpoint) -> None:
    path, pairs = values(endpoint)
    assert set(parse(endpoint, path, pairs)) == set(endpoint.schema)
    with pytest.raises(ApiError, match="'nope': schema does not allow additional properties"):
        parse(endpoint, path, [*pairs, ("nope", "1")])
    for number, (name, value) in enumerate(pairs):
        parameter = endpoint.schema[name]
        without = pairs[:number] + pairs[number + 1 :]
        if parameter.optional:
            assert parse(endpoint, path, without)[name] == parameter.default
        else:
            with pytest.raises(ApiError, match=f"'{name}': parameter is missing and it is not optional"):
                parse(endpoint, path, without)
        if not isinstance(parameter.type, Array):
            with pytest.raises(ApiError, match=f"'{name}': duplicate parameter"):
                parse(endpoint, path, [*pairs, (name, value)])
        if isinstance(parameter.type, Integer | Boolean):
            for wrong in ("", "x", "1.5", "1e3", "0x10", " 1", "9" * 40):
                with pytest.raises(ApiError, match=f"'{name}': "):
                    parse(endpoint, path, [*without, (name, wrong)])


@pytest.mark.parametrize("endpoint", list(cases()))
def test_json_is_typed(endpoint: Endpoint) -> None:
    if endpoint.raw or endpoint.method in ("GET", "DELETE"):
        return
    import json

    path, pairs = values(endpoint)
    for name, _ in pairs:
        kind = endpoint.schema[name].type
        wrong: list[object] = [None, {}, 1.5]
        wrong += [True, [1]] if not isinstance(kind, Boolean | Array) else [1, "yes"]
        wrong += ["1"] if isinstance(kind, Integer | Array) else [7]
        for value in wrong:
            with pytest.raises(ApiError, match=f"'{name}': Expected"):
                parameters(endpoint, path, "", "application/json", json.dumps({name: value}).encode())


@pytest.mark.parametrize("text", PATHS)
@pytest.mark.parametrize("name", ["store", "ns", "backup-id", "file-name", "archive-name"])
def test_names_that_would_leave_the_store_are_no_names(name: str, text: str) -> None:
    for endpoint in ALL:
        if name in endpoint.schema:
            path, pairs = values(endpoint)
            pairs = [(key, text if key == name else value) for key, value in pairs]
            if name in path:
                path[name] = text
            with pytest.raises(ApiError, match=f"'{name}': "):
                parse(endpoint, path, pairs)


@pytest.mark.parametrize(
    "body",
    [
        b"[1]",
        b"1",
        b'"x"',
        b"{",
        b'{"a":NaN}',
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 5000,
        b'{"dry-run":true,"dry-run":false}',
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    endpoint = next(one for one in ENDPOINTS if one.path.endswith("/prune"))
    with pytest.raises(ApiError):
        parameters(endpoint, {"store": "main"}, "", "application/json", body)


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ApiError, match="too many parameters"):
        parameters(ENDPOINTS[0], {}, "a&" * 40_000, None, b"")
