"""What `fleece s3 endpoint check` finds out about an endpoint and one of its buckets (R5).

First what PBS's own check does: ask for the bucket, then write, read and delete `.s3-client-test`. Then what decides
whether backups work well there, tried out with objects under names of their own: put-if-absent, the listing, a copy,
deletes of several keys. At last what an administrator should know: versions, object lock, the clock.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

import trio

from datastore.s3.client import S3Client
from datastore.s3.counters import Counters
from datastore.s3.endpoint import Endpoint, Quirk
from datastore.s3.errors import S3Error
from datastore.s3.keys import CHECK_OBJECT, StoreKeys, check_key
from datastore.s3.link import EndpointLink, RetryPolicy
from datastore.s3.objects import Outcome

#: Quick answers: somebody sits in front of it.
POLICY: Final = RetryPolicy(attempts=3, patience_s=30.0, base_s=0.5, cap_s=2.0)
#: Seconds between the clocks from which on the difference is worth a warning, and from which on garbage collection
#: refuses to run.
CLOCK_WARNING_S: Final = 60.0
CLOCK_LIMIT_S: Final = 300.0
#: Seconds for the removal of the probe's objects when it was cancelled or has failed.
_CLEAN_UP_S: Final = 10.0


class Mark(Enum):
    """What one finding means."""

    OK = "ok"
    NOTE = "note"  #: nothing wrong, but good to know; or it could not be found out
    WARNING = "warning"  #: it works, worse than it should, or as soon as a quirk is set
    FAILED = "failed"  #: a datastore cannot live there


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried or asked for."""

    name: str  #: `bucket`, `put`, `get`, `put-if-absent`, `list`, `copy`, `multi-delete`, `delete`, ...
    mark: Mark
    text: str  #: for people


@dataclass(slots=True)
class ProbeReport:
    """Everything that was found out."""

    bucket: str
    findings: list[Finding] = field(default_factory=list)
    put_if_absent: bool | None = None  #: None here and below: it could not be found out
    multi_delete: bool | None = None
    versioning: str | None = None  #: `Enabled`, `Suspended`, or empty
    object_lock: str | None = None  #: `GOVERNANCE`, `COMPLIANCE`, `Enabled` without a default retention, or empty
    clock_offset_s: float | None = None  #: how far the endpoint's clock is ahead of ours
    quirks_to_set: tuple[Quirk, ...] = ()  #: missing in the configuration
    quirks_to_drop: tuple[Quirk, ...] = ()  #: configured, but the endpoint can do it

    @property
    def usable(self) -> bool:
        """True if nothing failed."""
        return all(finding.mark is not Mark.FAILED for finding in self.findings)

    def add(self, name: str, mark: Mark, text: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(name, mark, text))

    def to_json(self) -> dict[str, Any]:
        """What `fleece s3 endpoint check --output json` prints."""
        return {
            "bucket": self.bucket,
            "usable": self.usable,
            "findings": [{"name": one.name, "result": one.mark.value, "text": one.text} for one in self.findings],
            "put-if-absent": self.put_if_absent,
            "multi-delete": self.multi_delete,
            "versioning": self.versioning,
            "object-lock": self.object_lock,
            "clock-offset": None if self.clock_offset_s is None else round(self.clock_offset_s, 1),
            "quirks-to-set": [quirk.value for quirk in self.quirks_to_set],
            "quirks-to-drop": [quirk.value for quirk in self.quirks_to_drop],
        }


async def probe(
    endpoint: Endpoint,
    bucket: str,
    *,
    store: str | None = None,
    policy: RetryPolicy = POLICY,
    counters: Counters | None = None,
) -> ProbeReport:
    """Find out whether and how a datastore can live in `bucket`.

    What the endpoint refuses is a finding, not an error. Objects that the probe wrote are removed, also when it is
    cancelled; chunks and metadata are never touched.

    Args:
        endpoint: which one; its quirks are compared with what is found.
        bucket: which one.
        store: put the objects where those of the datastore of this name lie; the key's rights may end there.
        policy: how long each request is tried.
        counters: count its requests.

    Raises:
        UsageError: no name of a bucket or datastore.
    """
    prefix = "" if store is None else StoreKeys(store).everything
    async with EndpointLink.open(replace(endpoint, quirks=frozenset()), counters=counters, policy=policy) as link:
        return await _Probe(S3Client(link, bucket), endpoint, prefix).run()


class _Probe:
    def __init__(self, client: S3Client, endpoint: Endpoint, prefix: str) -> None:
        self._client, self._link, self._configured = client, client.link, endpoint.quirks
        self._report = ProbeReport(client.bucket)
        self._simple = check_key(f"{prefix}{CHECK_OBJECT}")
        # Names of its own: another check at the same time must not look like an endpoint that breaks its promises.
        self._keys = [f"{self._simple}-{secrets.token_hex(6)}-{number}" for number in range(3)]
        self._body = secrets.token_bytes(64)
        self._left: set[str] = set()  # objects that may be there

    async def run(self) -> ProbeReport:
        try:
            if await self._ask_for_bucket():
                await self._write_read_delete()
                if self._report.usable:
                    await self._try_put_if_absent()
                    await self._try_listing()
                    await self._try_copy()
                    await self._try_multi_delete()
                    await self._ask_for_versioning()
                    await self._ask_for_object_lock()
        finally:
            with trio.move_on_after(_CLEAN_UP_S, shield=True):
                await self._clean_up()
        self._look_at_clock()
        self._compare_quirks()
        return self._report

    async def _ask_for_bucket(self) -> bool:
        try:
            await self._client.head_bucket()
        except S3Error as error:
            self._failed("bucket", error)
            return False
        self._report.add("bucket", Mark.OK, "the bucket is there")
        return True

    async def _write_read_delete(self) -> None:
        """PBS's check, with an empty object as there."""
        async with self._step("put"):
            self._left.add(self._simple)
            await self._client.put(self._simple, [])
            self._report.add("put", Mark.OK, "objects can be written")
            async with self._step("get"):
                found = await self._client.get(self._simple)
                if found is None or len(found.data):
                    self._report.add("get", Mark.FAILED, "what was just written does not come back")
                else:
                    self._report.add("get", Mark.OK, "objects can be read")
            async with self._step("delete"):
                await self._client.delete(self._simple)
                self._left.discard(self._simple)
                self._report.add("delete", Mark.OK, "objects can be deleted")

    async def _try_put_if_absent(self) -> None:
        key = self._keys[0]
        self._left.add(key)
        quirk = f"set the provider quirk {Quirk.SKIP_IF_NONE_MATCH.value}"
        try:
            first = await self._client.put(key, [self._body], if_absent=True)
            second = await self._client.put(key, [self._body[::-1]], if_absent=True)
            found = await self._client.get(key)
        except S3Error as error:
            await self._without_condition(error, quirk)
            return
        kept = found is not None and bytes(found.data) == self._body
        if Quirk.SKIP_IF_NONE_MATCH in self._link.quirks:
            self._report.put_if_absent = False
            self._report.add("put-if-absent", Mark.WARNING, f"the endpoint refuses if-none-match; {quirk}")
        elif (first.outcome, second.outcome) == (Outcome.NEW, Outcome.DUPLICATE) and kept:
            self._report.put_if_absent = True
            self._report.add("put-if-absent", Mark.OK, "an object that is there is not written again")
        else:
            self._report.put_if_absent = False
            self._report.add("put-if-absent", Mark.WARNING, f"the endpoint does not respect if-none-match; {quirk}")

    async def _without_condition(self, refused: S3Error, quirk: str) -> None:
        """A conditional PUT was refused with an answer of another kind: if a plain one works, it is the condition."""
        try:
            await self._client.put(self._keys[0], [self._body])
        except S3Error:
            self._failed("put-if-absent", refused)
            return
        self._report.put_if_absent = False
        why = f"the endpoint refuses if-none-match ({refused.why}); {quirk}"
        self._report.add("put-if-absent", Mark.WARNING, why)

    async def _try_listing(self) -> None:
        async with self._step("list"):
            page = await self._client.page(self._keys[0])
            listed = [(one.key, one.size) for one in page.objects]
            if listed == [(self._keys[0], len(self._body))]:
                self._report.add("list", Mark.OK, "the listing has what was just written")
            else:
                why = "the listing does not have what was just written; garbage collection must be able to rely on it"
                self._report.add("list", Mark.FAILED, why)

    async def _try_copy(self) -> None:
        """Verify renames corrupt chunks; without it they stay in place, and are only reported."""
        self._left.add(self._keys[1])
        try:
            if await self._client.copy(self._keys[0], self._keys[1]):
                self._report.add("copy", Mark.OK, "objects can be copied")
                return
            why = "what is to be copied is not found"
        except S3Error as error:
            why = error.why
        text = f"objects cannot be copied ({why}); 'fleece verify' cannot set corrupt chunks aside"
        self._report.add("copy", Mark.WARNING, text)

    async def _try_multi_delete(self) -> None:
        quirk = f"set the provider quirk {Quirk.DELETE_ONE_BY_ONE.value}"
        refused = ""
        try:
            failures = await self._client.delete_many(self._keys)  # the last is absent, which must be no error
            if failures:
                refused = f"{failures[0].code} {failures[0].message}".strip()
            elif Quirk.DELETE_ONE_BY_ONE in self._link.quirks:
                refused = "it is not implemented"
            elif (await self._client.page(self._keys[0].rpartition("-")[0])).objects:
                refused = "the answer is good, but the objects are still there"
        except S3Error as error:
            refused = error.why
        if not refused:
            self._left.difference_update(self._keys)
            self._report.multi_delete = True
            self._report.add("multi-delete", Mark.OK, "many objects can be deleted with one request")
            return
        self._report.multi_delete = False
        self._report.add("multi-delete", Mark.WARNING, f"objects cannot be deleted together ({refused}); {quirk}")

    async def _ask_for_versioning(self) -> None:
        try:
            state = self._report.versioning = await self._client.versioning()
        except S3Error as error:
            self._report.add(
                "versioning", Mark.NOTE, f"the endpoint does not say whether it keeps versions: {error.why}"
            )
            return
        if state == "Enabled":
            text = (
                "the bucket keeps old versions: space is freed only by a lifecycle rule for noncurrent versions, "
                "or by 'fleece s3 purge-versions'"
            )
            self._report.add("versioning", Mark.WARNING, text)
        else:
            self._report.add("versioning", Mark.OK, "no versions are kept" if not state else "versions are suspended")

    async def _ask_for_object_lock(self) -> None:
        try:
            mode = self._report.object_lock = await self._client.object_lock()
        except S3Error as error:
            self._report.add(
                "object-lock", Mark.NOTE, f"the endpoint does not say whether it locks objects: {error.why}"
            )
            return
        if not mode:
            self._report.add("object-lock", Mark.OK, "objects are not locked")
        elif mode == "Enabled":
            self._report.add("object-lock", Mark.NOTE, "objects may be locked, but are not by default")
        else:
            text = f"new objects are locked ({mode}): deletes free no space before the retention ends"
            self._report.add("object-lock", Mark.WARNING, text)

    async def _clean_up(self) -> None:
        for key in sorted(self._left):
            try:
                await self._client.delete(key)
            except S3Error as error:
                if self._report.usable:
                    self._report.add("delete", Mark.FAILED, f"{key} could not be deleted: {error.why}")

    def _look_at_clock(self) -> None:
        offset = self._report.clock_offset_s = self._link.clock_offset_s
        if offset is None:
            return
        if abs(offset) <= CLOCK_WARNING_S:
            self._report.add("clock", Mark.OK, f"the clocks differ by {abs(offset):.0f} s")
            return
        way = "ahead of" if offset > 0 else "behind"
        text = f"the endpoint's clock is {abs(offset):.0f} s {way} this machine's"
        if abs(offset) > CLOCK_LIMIT_S:
            text += "; garbage collection refuses to run"
        self._report.add("clock", Mark.WARNING, text)

    def _compare_quirks(self) -> None:
        report = self._report
        tried = ((Quirk.SKIP_IF_NONE_MATCH, report.put_if_absent), (Quirk.DELETE_ONE_BY_ONE, report.multi_delete))
        report.quirks_to_set = tuple(
            quirk for quirk, works in tried if works is False and quirk not in self._configured
        )
        report.quirks_to_drop = tuple(quirk for quirk, works in tried if works and quirk in self._configured)
        known = [quirk for quirk, works in tried if works is False and quirk in self._configured]
        settled = {"put-if-absent": Quirk.SKIP_IF_NONE_MATCH, "multi-delete": Quirk.DELETE_ONE_BY_ONE}
        for number, finding in enumerate(report.findings):
            if finding.mark is Mark.WARNING and settled.get(finding.name) in known:
                text = f"{finding.text.partition('; set the')[0]}; the provider quirk for it is set"
                report.findings[number] = replace(finding, mark=Mark.NOTE, text=text)

    @asynccontextmanager
    async def _step(self, name: str) -> AsyncIterator[None]:
        """A refusal inside the block is the finding `name`."""
        try:
            yield
        except S3Error as error:
            self._failed(name, error)

    def _failed(self, name: str, error: S3Error) -> None:
        hint = f"; {error.hint}" if error.hint else ""
        self._report.add(name, Mark.FAILED, f"{error.why}{hint}")


def summary(report: ProbeReport) -> Sequence[str]:
    """The report for people, a line for each finding."""
    return [f"{finding.mark.value:<8} {finding.name:<14} {finding.text}" for finding in report.findings]
