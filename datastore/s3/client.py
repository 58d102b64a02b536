"""The objects of one bucket: read, write once, replace, copy, delete, list.

Every call is safe to repeat and is repeated by the link below (R13). Keys are full keys (`keys.py` makes them).
"Absent" is only said when the endpoint says so about the object, never because something else went wrong (R14).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from core.buffers import Buffer
from core.nursery import open_nursery
from datastore.blob import MAX_BLOB_SIZE, MAX_ENCODED_CHUNK, MAX_HEADER_SIZE
from datastore.s3.calls import Call, Reply, UnusableAnswerError
from datastore.s3.counters import Counters, Method
from datastore.s3.endpoint import Endpoint, Quirk, check_bucket
from datastore.s3.errors import S3AnswerError, S3BackendError, S3Error
from datastore.s3.keys import CHECK_OBJECT, check_key
from datastore.s3.link import EndpointLink, RetryPolicy
from datastore.s3.objects import (
    Fetched,
    ObjectInfo,
    Outcome,
    PutOutcome,
    check_copy,
    check_object,
    check_put,
    checked_xml,
    damaged,
    etag,
    info,
    refuse_error_in,
)
from datastore.s3.paging import EndlessListing
from datastore.s3.signer import encode_path
from datastore.s3.xml import (
    MAX_XML_SIZE,
    Bucket,
    DeleteFailure,
    Page,
    batches,
    delete_body,
    parse_buckets,
    parse_delete,
    parse_page,
    parse_text,
)

#: Bytes of the largest chunk object.
CHUNK_LIMIT: Final = MAX_ENCODED_CHUNK
#: Bytes of the largest other object.
META_LIMIT: Final = MAX_BLOB_SIZE + MAX_HEADER_SIZE
#: DELETE requests at once for providers without multi-object delete.
_PARALLEL_DELETES: Final = 8
#: Times that a body is sent if it arrives damaged.
_DAMAGED_ATTEMPTS: Final = 3
_CONTENT_TYPE: Final = "application/octet-stream"
_NOT_SUPPORTED: Final = frozenset({"NotImplemented", "MethodNotAllowed"})
#: Per-key codes of a batch that are worth another try.
_RETRY_KEY_CODES: Final = frozenset(
    {"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "ThrottlingException"}
)


class S3Client:
    """One bucket at one endpoint. Use `S3Client.open`, or several clients over one link.

    Raises:
        UsageError: no name of a bucket.
    """

    def __init__(self, link: EndpointLink, bucket: str) -> None:
        self.link = link
        self.bucket = check_bucket(bucket)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        endpoint: Endpoint,
        bucket: str,
        *,
        counters: Counters | None = None,
        policy: RetryPolicy | None = None,
    ) -> AsyncIterator["S3Client"]:
        """A client with a link of its own while the block runs; opening it sends nothing."""
        async with EndpointLink.open(endpoint, counters=counters, policy=policy) as link:
            yield cls(link, bucket)

    async def head_bucket(self) -> None:
        """Ask whether the bucket is there and ours.

        A refusal has no body that could say why, so a small listing is asked for then, whose refusal has one.

        Raises:
            S3BackendError: it is not there, or we have no rights.
            S3UnavailableError: no answer.
        """
        call = Call("reach the bucket", Method.HEAD, "HEAD", self.bucket, accept=frozenset({400, 403, 404}))
        reply = await self.link.send(call)
        if reply.status == 200:
            return
        query: list[tuple[str, str | None]] = [("list-type", "2"), ("prefix", CHECK_OBJECT)]
        listing = Call(call.what, Method.LIST, "GET", self.bucket, query=query, limit=MAX_XML_SIZE)
        try:
            await self.link.send(listing)
        except S3BackendError:
            raise
        except S3Error:
            pass  # it says no more than the first
        why = "there is no such bucket, or the access key has no rights there"
        raise S3BackendError(call.what, self.link.where(self.bucket), why, status=reply.status)

    async def get(self, key: str, *, limit: int = CHUNK_LIMIT, fresh: bool = False) -> Fetched | None:
        """Read an object; None if it is absent for certain.

        Args:
            key: full key.
            limit: bytes; a larger object is an error (`CHUNK_LIMIT`, `META_LIMIT`).
            fresh: over a new connection (R43).

        Raises:
            S3Error: as `EndpointLink.send`.
        """
        call = Call(
            "read the object",
            Method.GET,
            "GET",
            self.bucket,
            check_key(key),
            accept=frozenset({404}),
            limit=limit,
            fresh=fresh,
        )
        reply = await self.link.send(call, check_object)
        if reply.status == 404:
            await self._confirm_absent(call, reply)
            return None
        return Fetched(reply.body, info(reply))

    async def head(self, key: str) -> ObjectInfo | None:
        """What is known of an object without reading it; None if it is absent for certain.

        Raises:
            S3Error: as `EndpointLink.send`.
        """
        call = Call("look for the object", Method.HEAD, "HEAD", self.bucket, check_key(key), accept=frozenset({404}))
        reply = await self.link.send(call, check_object)
        if reply.status == 404:
            await self._confirm_absent(call, reply)
            return None
        return info(reply)

    async def put(self, key: str, body: Sequence[Buffer], *, if_absent: bool = False) -> PutOutcome:
        """Write an object.

        Cancelled, it may be there, be absent, or appear later; the link's listeners are told.

        Args:
            key: full key.
            body: its bytes in pieces, which are not copied and must not change meanwhile.
            if_absent: leave an object that is there as it is. With the quirk `skip-if-none-match-header` it is replaced
                all the same, and the outcome is NEW.

        Raises:
            S3UnknownOutcomeError: it may have been written.
            S3Error: as `EndpointLink.send`.
        """
        conditional = if_absent and Quirk.SKIP_IF_NONE_MATCH not in self.link.quirks
        condition = [("if-none-match", "*")] if conditional else []
        wants_md5 = self.bucket in self.link.md5_buckets
        call = Call(
            "store the object",
            Method.PUT,
            "PUT",
            self.bucket,
            check_key(key),
            headers=[("content-type", _CONTENT_TYPE), *condition],
            body=body,
            accept=frozenset({400, 412, 501}),
            keys=(key,),
        )
        reply = await self.link.send(call, check_put)
        if reply.status == 200:
            if damaged(reply):
                return await self._put_again(call)
            return PutOutcome(Outcome.NEW, etag(reply))
        if reply.status == 412 and conditional:
            return PutOutcome(Outcome.DUPLICATE, "")
        if conditional and (reply.status == 501 or reply.code == "NotImplemented"):
            self.link.learn_quirk(Quirk.SKIP_IF_NONE_MATCH)
            return await self.put(key, body)
        if not wants_md5 and reply.error is not None and "Content-MD5" in reply.error.message:
            self.link.md5_buckets.add(self.bucket)
            return await self.put(key, body, if_absent=if_absent)
        raise self.link.refusal(call, reply)

    async def copy(self, source: str, target: str) -> bool:
        """Copy an object inside the bucket, replacing `target`; False if there is no `source` for certain.

        Raises:
            S3Error: as `EndpointLink.send`.
        """
        headers = [
            ("content-type", _CONTENT_TYPE),
            ("x-amz-copy-source", encode_path(f"{self.bucket}/{check_key(source)}")),
            ("x-amz-metadata-directive", "REPLACE"),
        ]
        call = Call(
            "copy the object to",
            Method.COPY,
            "PUT",
            self.bucket,
            check_key(target),
            headers=headers,
            body=(),
            accept=frozenset({404}),
            keys=(target,),
        )
        reply = await self.link.send(call, check_copy)
        if reply.status == 404:
            await self._confirm_absent(call, reply)
            return False
        return True

    async def delete(self, key: str) -> None:
        """Delete an object; one that is absent is fine.

        Cancelled, it may still be deleted later; the link's listeners are told.

        Raises:
            S3UnknownOutcomeError: it may have been deleted, or be so later.
            S3Error: as `EndpointLink.send`.
        """
        call = Call(
            "delete the object",
            Method.DELETE,
            "DELETE",
            self.bucket,
            check_key(key),
            ok=frozenset({200, 202, 204}),
            accept=frozenset({404}),
            keys=(key,),
        )
        reply = await self.link.send(call)
        if reply.status == 404:
            await self._confirm_absent(call, reply)

    async def delete_many(self, keys: Sequence[str]) -> list[DeleteFailure]:
        """Delete up to 1000 objects in one request; absent ones are fine. No keys, no request.

        Cancelled, any of them may still be deleted later; the link's listeners are told.

        Returns:
            the keys that the endpoint refused to delete; retryable refusals were tried twice.

        Raises:
            S3UnknownOutcomeError: any of them may have been deleted, or be so later.
            S3Error: as `EndpointLink.send`.
            ValueError: more than 1000 keys.
        """
        if not keys:
            return []
        if len(next(iter(batches(keys)))) != len(keys):
            raise ValueError(f"{len(keys)} keys for one request")
        failures = await self._delete_batch(keys)
        again = [failure.key for failure in failures if failure.code in _RETRY_KEY_CODES]
        if again:
            lasting = [failure for failure in failures if failure.code not in _RETRY_KEY_CODES]
            failures = lasting + await self._delete_batch(again)
        return failures

    async def pages(self, prefix: str, *, token: str | None = None) -> AsyncGenerator[Page, None]:
        """All objects whose keys begin with `prefix`, page by page, in byte order of keys.

        A page that fails is asked for again, from its own token; `token` continues an earlier listing behind the page
        that had it. Wrap it in `contextlib.aclosing` where the loop may end early.

        Raises:
            S3BackendError: also if the bucket is gone.
            S3Error: as `EndpointLink.send`.
        """
        seen = EndlessListing(self.link.where(self.bucket, prefix))
        while True:
            page = await self.page(prefix, token)
            seen.check(page)
            yield page
            if page.token is None:
                return
            token = page.token

    async def page(self, prefix: str, token: str | None = None) -> Page:
        """One page of `pages`: the first, or the one that `token` leads to.

        Raises:
            S3Error: as `EndpointLink.send`.
        """
        query: list[tuple[str, str | None]] = [("list-type", "2"), ("prefix", prefix)]
        if token is not None:
            query.append(("continuation-token", token))
        call = Call("list the objects", Method.LIST, "GET", self.bucket, query=query, limit=MAX_XML_SIZE)
        pages: list[Page] = []

        def check(reply: Reply) -> None:
            page = parse_page(reply.body)
            if page.token is not None and page.token == token:
                raise UnusableAnswerError("the listing turns in a circle")
            pages.append(page)

        await self.link.send(call, check)
        return pages[-1]

    async def list_buckets(self) -> Sequence[Bucket]:
        """The buckets that the access key may see.

        Raises:
            S3Error: as `EndpointLink.send`.
        """
        return await list_buckets(self.link)

    async def versioning(self) -> str:
        """`Enabled`, `Suspended`, or empty if it was never on.

        Raises:
            S3Error: as `EndpointLink.send`; many providers refuse the question.
        """
        reply = await self._ask("versioning")
        return parse_text(reply.body, "VersioningConfiguration", ["Status"])

    async def object_lock(self) -> str:
        """The mode of the default retention (`GOVERNANCE`, `COMPLIANCE`), `Enabled` without one, empty if it is off.

        Where it is on, PUTs carry content-md5 from now on (R10).

        Raises:
            S3Error: as `EndpointLink.send`; many providers refuse the question.
        """
        reply = await self._ask("object-lock", accept=frozenset({404}))
        if reply.status == 404:
            if reply.code == "ObjectLockConfigurationNotFoundError":
                return ""
            raise self.link.refusal(self._question("object-lock"), reply)
        root = "ObjectLockConfiguration"
        enabled = parse_text(reply.body, root, ["ObjectLockEnabled"])
        if enabled:
            self.link.md5_buckets.add(self.bucket)
        return parse_text(reply.body, root, ["Rule", "DefaultRetention", "Mode"]) or enabled

    async def _put_again(self, call: Call) -> PutOutcome:
        """Replace what the endpoint has stored of a body that was damaged on the way."""
        unconditional = replace(call, headers=[header for header in call.headers if header[0] != "if-none-match"])
        for _ in range(_DAMAGED_ATTEMPTS - 1):
            reply = await self.link.send(unconditional, check_put)
            if reply.status != 200:
                raise self.link.refusal(call, reply)
            if not damaged(reply):
                return PutOutcome(Outcome.NEW, etag(reply))
        why = "the ETag of what was stored is not the MD5 of what was sent, each time"
        hint = "if this provider's ETags are no MD5, set content-md5 to never"
        raise S3AnswerError(call.what, self.link.where(self.bucket, call.key), why, hint, status=200)

    async def _ask(self, name: str, accept: frozenset[int] = frozenset()) -> Reply:
        return await self.link.send(self._question(name, accept), lambda reply: checked_xml(reply.body))

    def _question(self, name: str, accept: frozenset[int] = frozenset()) -> Call:
        query: list[tuple[str, str | None]] = [(name, None)]
        return Call(f"ask for {name} of", Method.GET, "GET", self.bucket, query=query, accept=accept)

    async def _confirm_absent(self, call: Call, reply: Reply) -> None:
        """Return if the object is absent; a 404 without a code may be anything, so the bucket is asked (R14)."""
        if reply.code == "NoSuchKey":
            return
        if reply.code:
            raise self.link.refusal(call, reply)
        await self.head_bucket()

    async def _delete_batch(self, keys: Sequence[str]) -> list[DeleteFailure]:
        if Quirk.DELETE_ONE_BY_ONE in self.link.quirks:
            return await self._delete_singly(keys)
        call = Call(
            "delete objects of",
            Method.POST,
            "POST",
            self.bucket,
            query=[("delete", None)],
            body=(delete_body([check_key(key) for key in keys]),),
            md5=True,
            limit=MAX_XML_SIZE,
            accept=frozenset({400, 405, 501}),
            keys=tuple(keys),
        )
        found: list[list[DeleteFailure]] = []
        asked = set(keys)

        def check(reply: Reply) -> None:
            refuse_error_in(reply)
            failures = parse_delete(reply.body)
            if any(failure.key not in asked for failure in failures):
                raise UnusableAnswerError("the answer speaks of keys that were not asked for")
            found.append(failures)

        reply = await self.link.send(call, check)
        if reply.status == 200:
            return found[-1]
        if reply.status in (405, 501) or reply.code in _NOT_SUPPORTED:
            self.link.learn_quirk(Quirk.DELETE_ONE_BY_ONE)
            return await self._delete_singly(keys)
        raise self.link.refusal(call, reply)

    async def _delete_singly(self, keys: Sequence[str]) -> list[DeleteFailure]:
        failures: list[DeleteFailure] = []
        rest = iter(keys)

        async def worker() -> None:
            for key in rest:
                try:
                    await self.delete(key)
                except S3BackendError:
                    raise
                except S3Error as error:
                    failures.append(DeleteFailure(key, error.code or "Unavailable", error.why))

        async with open_nursery() as nursery:
            for _ in range(min(_PARALLEL_DELETES, len(keys))):
                nursery.start_soon(worker)
        return failures


async def list_buckets(link: EndpointLink) -> Sequence[Bucket]:
    """The buckets that the access key may see.

    Raises:
        S3Error: as `EndpointLink.send`.
    """
    found: list[Sequence[Bucket]] = []
    call = Call("list the buckets of", Method.GET, "GET", None, limit=MAX_XML_SIZE)
    await link.send(call, lambda reply: found.append(parse_buckets(reply.body)))
    return found[-1]
