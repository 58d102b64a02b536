"""Calls of a server's REST interface: parameters, answers, errors, and credentials that are renewed on the way.

Everything a server says is untrusted: answers have a limit, JSON is parsed once and its types are checked by whoever
uses it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol
from urllib.parse import quote, urlencode

import trio

from core.buffers import Buffer
from datastore.s3.wire import Fault, HttpAnswer, HttpError, HttpRequest
from repository.remote.errors import (
    RemoteAnswerError,
    RemoteCertificateError,
    RemoteUnavailableError,
    clean_text,
    is_login_failure,
    refusal,
)

#: As the reference client calls itself; some servers log it.
USER_AGENT: Final = "proxmox-backup-client/1.0"
#: Bytes of an answer: a listing of 100 000 snapshots fits.
MAX_ANSWER: Final = 64 << 20
#: Values in a JSON answer, which take up to a hundred times their text as objects; such a listing has 2 million.
MAX_VALUES: Final = 4_000_000
#: Bytes of an error's text.
MAX_ERROR: Final = 64 << 10
#: Bytes of path and query; servers refuse more than 3072.
_MAX_URL: Final = 2800
#: Seconds before the tries of a call that nothing was heard of.
_PAUSES_S: Final = (0.5, 2.0, 5.0)

Parameters = Mapping[str, str | int | bool | Sequence[str] | None]


class Exchanger(Protocol):
    """A pool of connections."""

    async def exchange(
        self,
        request: HttpRequest,
        *,
        limit: Callable[[int], int],
        on_sent: Callable[[], None],
        fresh: bool = False,
    ) -> HttpAnswer:
        """See `datastore.s3.http.HttpPool.exchange`."""
        ...


class Credentials(Protocol):
    """What makes a request somebody's."""

    async def headers(self, method: str) -> list[tuple[str, str]]:
        """The headers for a request with `method`; logs in or renews a ticket where needed."""
        ...

    async def refused(self, headers: Sequence[tuple[str, str]]) -> bool:
        """The server does not accept `headers`, which were given before; True if others can be tried."""
        ...


class RestClient:
    """Calls on behalf of somebody. Any number of tasks."""

    def __init__(self, exchanger: Exchanger, server: str, where: str, *, scheme: str = "https") -> None:
        self._exchanger = exchanger
        self._server = server
        self._scheme = scheme
        self.where: Final = where  #: for messages

    async def call(
        self,
        method: str,
        path: str,
        parameters: Parameters | None = None,
        *,
        what: str,
        credentials: Credentials | None,
        where: str = "",
        body: Buffer | None = None,
    ) -> Any:
        """Call `/api2/json` + `path`, and return the `data` of the answer.

        A GET is tried again after a lost connection, anything else only if nothing of it was sent. Refused credentials
        are renewed once.

        Args:
            method: of HTTP.
            path: encoded, with a leading slash.
            parameters: None and missing values are left out, lists are repeated.
            what: for messages, `list the snapshots of`.
            credentials: None for a call that needs none.
            where: for messages, default the repository.
            body: raw content; the parameters are in the query then.

        Raises:
            RemoteLoginError, RemoteRefusedError: as the server says.
            RemoteUnavailableError, RemoteCertificateError: no answer.
            RemoteAnswerError: no answer that a server gives.
        """
        answer = await self.answer(method, path, parameters, what=what, credentials=credentials, where=where, body=body)
        return unwrap(answer.body, what, where or self.where)

    async def document(
        self,
        method: str,
        path: str,
        parameters: Parameters | None = None,
        *,
        what: str,
        credentials: Credentials | None,
        where: str = "",
    ) -> dict[str, Any]:
        """As `call`, but with what stands beside `data`."""
        answer = await self.answer(method, path, parameters, what=what, credentials=credentials, where=where)
        return parse_document(answer.body, what, where or self.where)

    async def answer(
        self,
        method: str,
        path: str,
        parameters: Parameters | None = None,
        *,
        what: str,
        credentials: Credentials | None,
        where: str = "",
        body: Buffer | None = None,
    ) -> HttpAnswer:
        """As `call`, but the whole answer."""
        where = where or self.where
        target, content, kind = encode_call(method, f"/api2/json{path}", parameters or {}, raw=body is not None)
        if body is not None:
            content, kind = body, "application/octet-stream"
        renewed = False
        while True:
            headers = [("Host", self._server), ("User-Agent", USER_AGENT)]
            if kind:
                headers.append(("Content-Type", kind))
            if method in ("POST", "PUT") or len(content):
                headers.append(("Content-Length", str(len(content))))
            own = [] if credentials is None else await credentials.headers(method)
            headers += own
            request = HttpRequest(
                method, self._scheme, self._server, target, headers, (content,) if len(content) else ()
            )
            answer = await self._exchange(request, what, where)
            if 200 <= answer.status < 300:
                return answer
            expired = is_login_failure(answer.status, clean_text(bytes(answer.body)))
            if expired and credentials is not None and not renewed and await credentials.refused(own):
                renewed = True
                continue
            raise refusal(what, where, answer.status, bytes(answer.body))

    async def _exchange(self, request: HttpRequest, what: str, where: str) -> HttpAnswer:
        is_get = request.method == "GET"

        def limit(status: int) -> int:
            return MAX_ANSWER if 200 <= status < 300 else MAX_ERROR

        for pause_s in (*_PAUSES_S, None):
            sent = False

            def on_sent() -> None:
                nonlocal sent
                sent = True

            try:
                # A kept connection may have been closed by the server just now, which must not lose a change.
                return await self._exchanger.exchange(request, limit=limit, on_sent=on_sent, fresh=not is_get)
            except HttpError as error:
                if error.fault is Fault.CERTIFICATE:
                    raise wrong_certificate(what, where, error.why) from error
                if error.fault is Fault.MALFORMED:
                    raise RemoteAnswerError(what, where, error.why) from error
                if pause_s is None or (sent and not is_get):
                    hint = "" if is_get or not sent else "whether it was done is not known"
                    raise RemoteUnavailableError(what, where, error.why, hint) from error
            await trio.sleep(pause_s)
        raise AssertionError("unreachable")


def wrong_certificate(what: str, where: str, why: str) -> RemoteCertificateError:
    """The error for a server that is not trusted."""
    hint = "if it is the right server, give its fingerprint in PBS_FINGERPRINT, or confirm it at a terminal"
    return RemoteCertificateError(what, where, f"its certificate is not accepted: {why}", hint)


def encode_query(parameters: Parameters) -> str:
    """The query string without `?`."""
    pairs: list[tuple[str, str]] = []
    for name, value in parameters.items():
        if value is None:
            continue
        if isinstance(value, bool):
            pairs.append((name, "true" if value else "false"))
        elif isinstance(value, str | int):
            pairs.append((name, str(value)))
        else:
            pairs += [(name, element) for element in value]
    return urlencode(pairs, quote_via=quote, safe="")


def encode_call(method: str, path: str, parameters: Parameters, *, raw: bool = False) -> tuple[str, Buffer, str]:
    """Target, body and content type: as the reference client, POST has a JSON body and everything else a query.

    A PUT that would be too long for a URL has a JSON body too.
    """
    query = encode_query(parameters)
    if not raw and parameters and (method == "POST" or (method == "PUT" and len(path) + len(query) > _MAX_URL)):
        given = {name: value for name, value in parameters.items() if value is not None}
        return path, json.dumps(given).encode(), "application/json"
    return path + (f"?{query}" if query else ""), b"", ""


def parse_document(body: Buffer, what: str, where: str) -> dict[str, Any]:
    """The object of a JSON answer, which has `data`.

    Raises:
        RemoteAnswerError: it is none.
    """
    text = bytes(body)
    if len(text) > MAX_VALUES and text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise RemoteAnswerError(what, where, f"the server's answer has more than {MAX_VALUES} values")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteAnswerError(what, where, f"the server's answer is no JSON ({str(error)[:100]})") from None
    if not isinstance(document, dict) or "data" not in document:
        raise RemoteAnswerError(what, where, "the server's answer has no 'data'")
    return document


def unwrap(body: Buffer, what: str, where: str) -> Any:
    """The `data` of a JSON answer.

    Raises:
        RemoteAnswerError: there is none.
    """
    return parse_document(body, what, where)["data"]
