"""From a request to the function that answers it: paths, rights, parameters."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

import trio

from core.errors import FleeceError
from datastore.blob import MAX_ENCODED_CHUNK
from server.access.auth_ids import AuthId
from server.access.roles import Privilege
from server.answers import Answer, envelope, refusal
from server.errors import ApiError, BodyError, TooLargeError, forbidden
from server.schema import Schema, from_json, from_pairs, parse_pairs

if TYPE_CHECKING:
    from server.state import ServerState

_LOG = logging.getLogger(__name__)
#: Bytes of path and query, and of a body that is parsed (spec 3.2).
MAX_URI: Final = 3072
MAX_BODY: Final = 512 << 10
_FORM: Final = "application/x-www-form-urlencoded"
_JSON: Final = "application/json"


class Open(Enum):
    """Calls without a declared privilege."""

    WORLD = "no credentials needed"
    ANYBODY = "any valid credentials; the call checks further by itself"


@dataclass(frozen=True, slots=True)
class Needs:
    """Calls that need one of `privileges` on `path`, whose `{name}` are parameters of the path."""

    privileges: Privilege
    path: str


@dataclass(slots=True)
class Call:
    """One request, authenticated and checked."""

    state: "ServerState"
    caller: AuthId
    values: dict[str, Any]  #: every parameter of the schema
    body: bytes = b""  #: of a raw call
    peer: str = ""  #: address of the client
    headers: Mapping[str, str] = field(default_factory=dict)  #: names in lower case
    path: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


Handler = Callable[[Call], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One call of the interface."""

    method: str
    path: str  #: `/admin/datastore/{store}/groups`
    handler: Handler | None = None
    schema: Schema = field(default_factory=dict)
    access: Open | Needs = Open.ANYBODY
    raw: bool = False  #: parameters from the query only, any content type, the body goes to the handler
    upgrade: "Callable[[Call], AbstractAsyncContextManager[Any]] | None" = None

    @property
    def max_body(self) -> int:
        """Bytes that a body may have."""
        return MAX_ENCODED_CHUNK if self.raw and self.method == "POST" else MAX_BODY - 1


class Routes:
    """All calls, found by method and path; folders on the way answer GET with what is in them."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints: Final = tuple(endpoints)
        self._found: dict[tuple[str, ...], dict[str, Endpoint]] = {}
        folders: dict[tuple[str, ...], set[str]] = {}
        for endpoint in self.endpoints:
            parts = tuple(part for part in endpoint.path.split("/") if part)
            self._found.setdefault(parts, {})[endpoint.method] = endpoint
            for number, part in enumerate(parts):
                folders.setdefault(parts[:number], set()).add(part)
        self._by_length: dict[int, list[tuple[str, ...]]] = {}
        for parts, names in folders.items():
            if "GET" not in self._found.setdefault(parts, {}):
                self._found[parts]["GET"] = _listing("/".join(parts), names)
        for parts in self._found:
            # Fixed names before parameters, so that a store cannot hide a call.
            self._by_length.setdefault(len(parts), []).append(parts)
        for candidates in self._by_length.values():
            candidates.sort(key=lambda parts: [part.startswith("{") for part in parts])

    def find(self, method: str, parts: tuple[str, ...]) -> tuple[Endpoint, dict[str, str]] | None:
        """The call at the path, and the parameters that stand in the path; None if there is none."""
        for candidate in self._by_length.get(len(parts), ()):
            values = {}
            for wanted, part in zip(candidate, parts, strict=True):
                if wanted.startswith("{"):
                    values[wanted[1:-1]] = part
                elif wanted != part:
                    break
            else:
                endpoint = self._found[candidate].get(method)
                return None if endpoint is None else (endpoint, values)
        return None


def _listing(path: str, names: set[str]) -> Endpoint:
    from server.schema import SAFE, UPID, Parameter, Text

    schema = {
        part[1:-1]: Parameter(UPID if part == "{upid}" else Text(SAFE, 0, 64))
        for part in path.split("/")
        if part.startswith("{")
    }
    entries = [{"subdir": name} for name in sorted(names) if not name.startswith("{")]

    async def handler(call: Call) -> object:
        return entries

    return Endpoint("GET", f"/{path}", handler, schema)


def split_path(path: str) -> tuple[str, ...]:
    """The decoded components of a path; empty ones do not count.

    Raises:
        ApiError: one begins with a dot, or is no UTF-8.
    """
    parts = []
    for part in path.split("/"):
        try:
            decoded = unquote_to_bytes(part).decode()
        except UnicodeDecodeError:
            raise ApiError("path contains illegal components") from None
        if decoded.startswith("."):
            raise ApiError("path contains illegal components")
        if decoded:
            parts.append(decoded)
    return tuple(parts)


def check_declared(endpoint: Endpoint, state: "ServerState", caller: AuthId | None, path: Mapping[str, str]) -> None:
    """See to it that the caller may use the call.

    Raises:
        ApiError: 403.
    """
    if isinstance(endpoint.access, Needs):
        where = endpoint.access.path
        for name, value in path.items():
            where = where.replace(f"{{{name}}}", value)
        assert caller is not None
        parts = [part for part in where.split("/") if part]
        if not state.access.tree().privileges(caller, parts) & endpoint.access.privileges:
            raise forbidden()


def parameters(
    endpoint: Endpoint, path: Mapping[str, str], query: str, content_type: str | None, body: bytes
) -> dict[str, Any]:
    """The checked parameters of a request.

    Raises:
        ApiError: wrong ones, or a content type that cannot be.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if not endpoint.raw and kind == _JSON:
        return from_json(endpoint.schema, body, path)
    if not endpoint.raw and kind not in ("", _FORM):
        raise ApiError(f'unsupported content type Ok("{content_type}")')
    pairs = [(key, value) for key, value in parse_pairs(query) if key != "_dc"]
    if not endpoint.raw and endpoint.method in ("POST", "PUT") and body:
        try:
            pairs += parse_pairs(body.decode())
        except UnicodeDecodeError:
            raise ApiError("invalid utf-8 sequence in parameters") from None
    return from_pairs(endpoint.schema, pairs, path)


async def answer(work: Callable[[], Awaitable[object]], what: str, *, extjs: bool = False) -> Answer:
    """What `work` returns as an answer; what it raises too, after the delay that belongs to it."""
    try:
        return envelope(await work(), extjs=extjs)
    except (TooLargeError, BodyError):
        raise  # the connection is of no use any more
    except Exception as error:
        refused = as_api_error(error, what)
    if refused.delay_s:
        await trio.sleep(refused.delay_s)
    return refusal(refused, extjs=extjs)


def as_api_error(error: Exception, what: str) -> ApiError:
    """The refusal for what a handler raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FleeceError):
        return ApiError(str(error))
    _LOG.error("%r failed unexpectedly", what, exc_info=error)
    return ApiError(f"internal error ({type(error).__name__})")
