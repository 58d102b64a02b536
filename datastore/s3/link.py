"""The way to one endpoint: attempts, waits, time-outs, clocks, signatures, counted requests.

What an answer means is decided here by its code, not by its status alone (R14). Everything above speaks of objects.
"""

import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

import trio

from core.dial import Dialer, Proxy, TlsPin
from core.errors import FormatError
from datastore.s3.calls import (
    CLOCK_TOLERANCE_S,
    MAX_ERROR_SIZE,
    Call,
    Reply,
    UnusableAnswerError,
    describe,
    is_retryable,
    is_throttle,
    refusal,
    retry_after,
)
from datastore.s3.counters import Counters, Method
from datastore.s3.endpoint import ContentMd5, Endpoint, Quirk
from datastore.s3.errors import (
    S3AnswerError,
    S3CertificateError,
    S3Error,
    S3ThrottledError,
    S3UnavailableError,
    S3UnknownOutcomeError,
)
from datastore.s3.hashing import BodyHasher, content_md5
from datastore.s3.http import HttpPool
from datastore.s3.pacing import DEFAULT_PARALLEL, Gate, TokenBucket
from datastore.s3.signer import Signer, encode_path, encode_query, format_date
from datastore.s3.wire import Fault, HttpAnswer, HttpError, HttpRequest
from datastore.s3.xml import parse_error

_LOG = logging.getLogger(__name__)
#: Seconds for one attempt, as PBS: 30 minutes, for a PUT more if that means less than 1 KiB/s.
ATTEMPT_TIMEOUT_S: Final = 1800.0
_CHANGING: Final = frozenset({Method.PUT, Method.COPY, Method.POST, Method.DELETE})


class UnknownOutcome(NamedTuple):
    """A change that was sent and may be carried out at any time, even after later requests (R31)."""

    method: Method  #: POST is a batch of deletes
    keys: Sequence[str]  #: full keys


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long the same request is tried (R13)."""

    attempts: int = 8  #: for answers that ask to try again
    patience_s: float = 900.0  #: for everything, above all an endpoint that is out of reach
    base_s: float = 0.5  #: first wait is up to this, then twice as much each time
    cap_s: float = 30.0


@dataclass
class _Failure:
    """Why an attempt gave nothing."""

    why: str
    status: int = 0
    code: str = ""
    heard: bool = True  #: the endpoint answered
    throttled: bool = False
    retry_after_s: float = 0.0


@dataclass
class _Progress:
    """What is remembered from attempt to attempt of one call."""

    attempt: int = 0
    sent: bool = False  #: this attempt's request was begun
    unknown: bool = False  #: some attempt may be carried out later
    corrected: bool = False  #: the clock was corrected for this call
    failures: list[_Failure] = field(default_factory=list)


class EndpointLink:
    """Everything that clients of one endpoint share in this process: connections, gate, limits, clock, quirks found.

    Use `EndpointLink.open`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        counters: Counters | None = None,
        policy: RetryPolicy | None = None,
        parallel: int = DEFAULT_PARALLEL,
        unknown: Callable[[UnknownOutcome], None] | None = None,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint = endpoint
        self.counters = counters or Counters()
        self.policy = policy or RetryPolicy()
        self.gate = Gate(parallel)
        self.quirks = set(endpoint.quirks)
        self.md5_buckets: set[str] = set()  #: buckets that want content-md5 (object lock)
        self._listeners: list[Callable[[UnknownOutcome], None]] = [] if unknown is None else [unknown]
        self._now = now
        self._chance = chance
        self._offset_s: float | None = None
        self._correction_s = 0.0
        self._hasher = BodyHasher()
        self._signer = Signer(endpoint.access_key, endpoint.secret, endpoint.region)
        self._puts = _bucket(endpoint.put_rate_limit)
        self._requests = _bucket(endpoint.request_rate_limit)
        pin = TlsPin.parse(endpoint.fingerprint, only=endpoint.fingerprint_only)
        self._pool = HttpPool(
            dialer=Dialer(pin, proxy=None if endpoint.proxy is None else Proxy.parse(endpoint.proxy)),
            max_connections=parallel,
            received=_bucket(endpoint.rate_in, endpoint.burst_in),
            sent=_bucket(endpoint.rate_out, endpoint.burst_out),
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        endpoint: Endpoint,
        *,
        counters: Counters | None = None,
        policy: RetryPolicy | None = None,
        parallel: int = DEFAULT_PARALLEL,
        unknown: Callable[[UnknownOutcome], None] | None = None,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> AsyncIterator["EndpointLink"]:
        """A link while the block runs; opening it sends nothing.

        Args:
            endpoint: where and who.
            counters: counts requests; shared ones may be given.
            policy: how long to try.
            parallel: requests at once, at most.
            unknown: told of every change whose outcome is unknown, also when the call is cancelled or a later attempt
                succeeds; must return at once.
            now: the clock, Unix seconds.
            chance: random numbers from 0 to 1 for the waits.
        """
        link = cls(
            endpoint, counters=counters, policy=policy, parallel=parallel, unknown=unknown, now=now, chance=chance
        )
        try:
            yield link
        finally:
            with trio.CancelScope(shield=True):  # closes sockets, waits for nobody
                await link._pool.aclose()

    @property
    def clock_offset_s(self) -> float | None:
        """How far the endpoint's clock is ahead of ours, to about a second; None before the first answer."""
        return self._offset_s

    def on_unknown_outcome(self, listener: Callable[[UnknownOutcome], None]) -> None:
        """Tell `listener`, too, of changes whose outcome is unknown."""
        self._listeners.append(listener)

    def use_keys(self, access_key: str, secret: str) -> None:
        """Sign with other keys from now on."""
        self.endpoint = replace(self.endpoint, access_key=access_key, secret=secret)
        self._signer = Signer(access_key, secret, self.endpoint.region)

    def where(self, bucket: str | None, key: str = "") -> str:
        """How messages name a place."""
        return self.endpoint.id if bucket is None else f"{self.endpoint.id}:{bucket}" + (f"/{key}" if key else "")

    async def send(self, call: Call, check: Callable[[Reply], None] | None = None) -> Reply:
        """Send `call` until there is an answer that counts.

        Cancelled, connections are closed at once; if a change was being sent, listeners are told of it.

        Args:
            call: the request.
            check: looks at a good answer and may raise `UnusableAnswerError`.

        Raises:
            S3BackendError: keys, rights, region, certificate or clock are wrong, or the bucket is gone.
            S3UnavailableError: no answer after all attempts; `S3UnknownOutcomeError` if the change may have happened.
            S3ObjectError: the object cannot be used.
            S3AnswerError: a bad answer each time.
            S3BudgetError: a limit on verify or prefetch.
            S3Error: refused for another reason.
        """
        headers, sha256, md5 = await self._prepare(call)
        state = _Progress()
        give_up_at = trio.current_time() + self.policy.patience_s
        while True:
            state.attempt += 1
            self.counters.check_limit(self.where(call.bucket))
            failure = await self._attempt(call, headers, sha256, md5, check, state)
            if isinstance(failure, Reply):
                return failure
            state.failures.append(failure)
            wait_s = max(
                self._chance() * min(self.policy.cap_s, self.policy.base_s * 2 ** min(state.attempt - 1, 16)),
                failure.retry_after_s,
            )
            answers = sum(known.heard for known in state.failures)
            if answers >= self.policy.attempts or trio.current_time() + wait_s > give_up_at:
                raise self._gave_up(call, state)
            await trio.sleep(wait_s)

    async def _prepare(self, call: Call) -> tuple[list[tuple[str, str]], str, str]:
        """Headers that are the same for all attempts, the body's SHA-256, and its content-md5 or nothing."""
        body = call.body or ()
        size = sum(memoryview(part).nbytes for part in body)
        sha256 = await self._hasher.sha256(body)
        # Buckets with object lock want it with every PUT, markers without content too.
        empty_wants = call.method is Method.PUT and call.bucket in self.md5_buckets
        md5 = await content_md5(body) if (size or empty_wants) and self._wants_md5(call) else ""
        headers = [("host", self.endpoint.authority(call.bucket)), ("x-amz-content-sha256", sha256), *call.headers]
        if call.body is not None:
            headers.append(("content-length", str(size)))
        if md5:
            headers.append(("content-md5", md5))
        return headers, sha256, md5

    def _wants_md5(self, call: Call) -> bool:
        setting = self.endpoint.content_md5
        if call.md5 or setting is ContentMd5.ALWAYS:
            return True
        return setting is ContentMd5.AUTO and (self.endpoint.allow_http or call.bucket in self.md5_buckets)

    async def _attempt(
        self,
        call: Call,
        headers: list[tuple[str, str]],
        sha256: str,
        md5: str,
        check: Callable[[Reply], None] | None,
        state: _Progress,
    ) -> Reply | _Failure:
        if self._requests is not None:
            await self._requests.take()
        if self._puts is not None and call.method in (Method.PUT, Method.COPY):
            await self._puts.take()
        async with self.gate.slot():
            state.sent = False
            try:
                answer = await self._exchange(call, headers, sha256, state)
            except HttpError as error:
                self._note_unknown(call, state)
                if error.fault is Fault.CERTIFICATE:
                    hint = "'fleece s3 endpoint check' shows the endpoint's certificate"
                    raise S3CertificateError(call.what, self.where(call.bucket, call.key), error.why, hint) from error
                return _Failure(error.why, heard=error.fault is Fault.MALFORMED)
            except BaseException:  # cancelled
                self._note_unknown(call, state)
                raise
            return self._judge(call, answer, md5, check, state)

    async def _exchange(self, call: Call, headers: list[tuple[str, str]], sha256: str, state: _Progress) -> HttpAnswer:
        """One attempt on the wire, signed now (R11), within its time (R12)."""
        size = sum(memoryview(part).nbytes for part in call.body or ())

        def sent() -> None:
            state.sent = True
            self.counters.request(call.method)
            self.counters.uploaded(size)

        path = encode_path(self.endpoint.path(call.bucket, call.key))
        started = self._now()
        date = format_date(started + self._correction_s)
        signed = [*headers, ("x-amz-date", date)]
        signature = self._signer.authorization(call.verb, path, call.query, signed, sha256, date)
        request = HttpRequest(
            call.verb,
            self.endpoint.scheme,
            self.endpoint.authority(call.bucket),
            path + (f"?{encode_query(call.query)}" if call.query else ""),
            [*signed, ("authorization", signature)],
            call.body or (),
        )
        total_s = max(ATTEMPT_TIMEOUT_S, math.ceil(size / 1024))
        with trio.move_on_after(total_s):
            answer = await self._pool.exchange(
                request,
                limit=lambda status: call.limit if status in call.ok else MAX_ERROR_SIZE,
                on_sent=sent,
                fresh=call.fresh,
            )
            self.counters.downloaded(len(answer.body))
            self._look_at_clock(answer, started)
            return answer
        raise HttpError(Fault.TIMEOUT, f"no whole answer within {total_s:.0f} s")

    def _judge(
        self, call: Call, answer: HttpAnswer, md5: str, check: Callable[[Reply], None] | None, state: _Progress
    ) -> Reply | _Failure:
        """What the answer means: a reply, a reason to try again, or an error that is raised."""
        reply = Reply(answer.status, answer.headers, answer.body, md5=md5)
        if answer.status in call.ok:
            try:
                if check is not None:
                    check(reply)
            except UnusableAnswerError as error:
                if error.error is None:
                    return _Failure(error.why, answer.status)
                reply = replace(reply, error=error.error)
            except FormatError as error:
                return _Failure(error.why, answer.status)
            else:
                self.gate.succeeded()
                return reply
        else:
            reply = replace(reply, error=parse_error(answer.body))
        if self._again_with_right_time(reply, state):
            return _Failure("the clocks differ", reply.status, reply.code)
        throttled = is_throttle(reply) or self.endpoint.is_throttle(reply.status, reply.code)
        if throttled:
            self.gate.throttled()
        if throttled or is_retryable(reply):
            if not throttled and reply.status != 409:
                self._note_unknown(call, state)
            why = describe(reply)
            return _Failure(why, reply.status, reply.code, True, throttled, retry_after(reply.headers, self._now()))
        if reply.status in call.accept:
            self.gate.succeeded()
            return reply
        raise self.refusal(call, reply)

    def _note_unknown(self, call: Call, state: _Progress) -> None:
        if state.sent and call.method in _CHANGING:
            state.unknown = True
            for listener in self._listeners:
                listener(UnknownOutcome(call.method, call.keys))

    def _look_at_clock(self, answer: HttpAnswer, started: float) -> None:
        try:
            theirs = parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (KeyError, ValueError, OverflowError):
            return
        # The header has whole seconds, rounded down.
        self._offset_s = theirs + 0.5 - (started + self._now()) / 2

    def _again_with_right_time(self, reply: Reply, state: _Progress) -> bool:
        """Correct the clock, once a call, if it is what the endpoint minds."""
        if state.corrected or self._offset_s is None or reply.status not in (400, 401, 403):
            return False
        off = abs(self._offset_s - self._correction_s) > CLOCK_TOLERANCE_S
        if not off or reply.code not in ("RequestTimeTooSkewed", "AccessDenied", "SignatureDoesNotMatch", ""):
            return False
        _LOG.warning(
            "the clock of S3 endpoint %s is %.0f s ahead of ours; signing with its time",
            self.endpoint.id,
            self._offset_s,
        )
        state.corrected = True
        self._correction_s = self._offset_s
        return True

    def refusal(self, call: Call, reply: Reply) -> S3Error:
        """The error for an answer that more attempts will not change."""
        return refusal(call, reply, self.where(call.bucket, call.key), self._offset_s or 0.0)

    def _gave_up(self, call: Call, state: _Progress) -> S3Error:
        last = state.failures[-1]
        where = self.where(call.bucket, call.key)
        why = f"{last.why} (attempt {state.attempt}, the last)"
        if state.unknown:
            kind: type[S3Error] = S3UnknownOutcomeError
        elif any(failure.throttled for failure in state.failures):
            kind = S3ThrottledError
        elif last.heard and last.status < 400:
            kind = S3AnswerError
        else:
            kind = S3UnavailableError
        return kind(call.what, where, why, status=last.status, code=last.code)

    def learn_quirk(self, quirk: Quirk) -> None:
        """Do without something from now on that the provider turned out not to know."""
        if quirk not in self.quirks:
            self.quirks.add(quirk)
            _LOG.warning(
                "S3 endpoint %s does not support all requests; going on as with the provider quirk %s",
                self.endpoint.id,
                quirk.value,
            )


def _bucket(rate: float | None, burst: float | None = None) -> TokenBucket | None:
    return None if rate is None else TokenBucket(rate, burst)
