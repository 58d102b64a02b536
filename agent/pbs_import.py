"""`fleece datastore import`: a PBS host's endpoints and datastores made known here. Nothing of PBS's is changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.pbs_config import PbsDatastore, PbsEndpoint, read_datastores, read_endpoints
from agent.registry import Datastore, S3Place
from core.errors import FleeceError, NotFoundError
from core.limits import in_io_thread

if TYPE_CHECKING:
    from agent.invocation import Invocation
    from core.progress import Progress


@dataclass(slots=True)
class Step:
    """What is to be done, or was done, with one section."""

    kind: str  #: `endpoint` or `datastore`
    name: str
    action: str  #: `add` and `register` and `take-over`, `present`, `left-out`, `failed`
    why: str = ""
    place: str = ""  #: folder, host, or endpoint and bucket

    def to_json(self) -> dict[str, Any]:
        """One element of the document."""
        return {
            "type": self.kind,
            "name": self.name,
            "action": self.action,
            "place": self.place,
            "why": self.why or None,
        }

    def line(self, *, dry_run: bool) -> str:
        """The same for people."""
        done = {"add": "added", "register": "registered", "take-over": "taken over"}
        words = self.action if dry_run else done.get(self.action, self.action)
        text = f"{self.kind} {self.name} ({self.place}): {words.replace('-', ' ')}"
        return f"{text}; {self.why}" if self.why else text


class PbsImport:
    """The import of one folder of configuration.

    Args:
        invocation: the call.
        folder: with PBS's files.
        names: only these datastores, and the endpoints that they need; empty: all.
        cache: the folder in which caches of buckets are made; None: datastores in buckets are left out.
        overwrite_in_use: take buckets from the PBS that uses them.

    Raises:
        NotFoundError: a name that is not in the file.
        FleeceError: the files cannot be read.
    """

    def __init__(
        self,
        invocation: "Invocation",
        folder: Path,
        names: Sequence[str],
        cache: Path | None,
        *,
        overwrite_in_use: bool,
    ) -> None:
        self._invocation, self._cache, self._overwrite_in_use = invocation, cache, overwrite_in_use
        stores = read_datastores(folder)
        if unknown := set(names) - {store.name for store in stores}:
            known = ", ".join(store.name for store in stores)
            raise NotFoundError(
                "import", ", ".join(sorted(unknown)), f"{folder} has no such datastore", f"it has {known}"
            )
        self._stores = [store for store in stores if not names or store.name in names]
        endpoints = read_endpoints(folder)
        wanted = {store.client for store in self._stores}
        self._endpoints = [one for one in endpoints if not names or one.id in wanted]
        self._known_endpoints = {one.id for one in endpoints if one.section is not None}

    def plan(self) -> list[Step]:
        """What would be done.

        Raises:
            FleeceError: the lists of this host cannot be read.
        """
        return [*(self._plan_endpoint(one) for one in self._endpoints), *map(self._plan_store, self._stores)]

    async def carry_out(self, progress: "Progress") -> list[Step]:
        """Do it; what fails is told in its step, and the rest goes on.

        Raises:
            FleeceError: the lists of this host cannot be read.
        """
        steps = []
        for endpoint in self._endpoints:
            step = self._plan_endpoint(endpoint)
            if step.action == "add" and endpoint.section is not None:
                try:
                    self._invocation.endpoints.add(endpoint.id, endpoint.section, endpoint.secret)
                except FleeceError as error:
                    step.action, step.why = "failed", error.why
            steps.append(step)
        for store in self._stores:
            step = self._plan_store(store)
            try:
                await self._carry_out_store(store, step, progress)
            except FleeceError as error:
                step.action = "failed"
                step.why = error.why + (f"; {error.hint}" if error.hint else "")
            steps.append(step)
        return steps

    def _plan_endpoint(self, endpoint: PbsEndpoint) -> Step:
        if endpoint.section is None:
            return Step("endpoint", endpoint.id, "left-out", endpoint.why, "?")
        step = Step("endpoint", endpoint.id, "add", place=endpoint.section.endpoint)
        if endpoint.ignored:
            step.why = f"without {', '.join(endpoint.ignored)}, which Fleece does not know"
        present = self._invocation.endpoints.sections().get(endpoint.id)
        if present is not None:
            same = (present.endpoint, present.access_key) == (endpoint.section.endpoint, endpoint.section.access_key)
            step.action, step.why = "present", "" if same else "another endpoint has that name here, and stays"
        return step

    def _plan_store(self, store: PbsDatastore) -> Step:
        if store.path is None:
            return Step("datastore", store.name, "left-out", store.why, "?")
        if store.client is None:
            step = Step("datastore", store.name, "register", place=str(store.path))
        else:
            step = Step("datastore", store.name, "take-over", place=f"{store.client}:{store.bucket}")
            if store.ignored:
                step.why = f"without {', '.join(store.ignored)}, which Fleece does not understand"
        registered = self._invocation.registry.datastores()
        wanted = self._registered(store)
        present = registered.get(store.name)
        if present is not None:
            same = present.s3 == wanted.s3 if wanted.s3 is not None else present.path == wanted.path
            step.action = "present"
            step.why = "" if same else "another datastore has that name here, and stays"
        elif store.client is not None and store.client not in (
            *self._known_endpoints,
            *self._invocation.endpoints.sections(),
        ):
            step.action, step.why = "left-out", f"its endpoint {store.client} is not in s3.cfg"
        elif store.client is not None and self._cache is None:
            command = f"fleece datastore create {store.name} --s3 {store.client} --bucket {store.bucket}"
            step.action = "left-out"
            step.why = f"--cache FOLDER is needed; or later: {command} --cache PATH --reuse --overwrite-in-use"
        return step

    def _registered(self, store: PbsDatastore) -> Datastore:
        """The datastore as it will be known here."""
        assert store.path is not None
        if store.client is None or store.bucket is None:
            return Datastore(store.name, store.path, store.sync_level)
        # PBS's own cache stays PBS's.
        cache = store.path if self._cache is None else self._cache / store.name
        return Datastore(store.name, cache, store.sync_level, S3Place(store.client, store.bucket, store.max_cache_size))

    async def _carry_out_store(self, store: PbsDatastore, step: Step, progress: "Progress") -> None:
        wanted = None if store.path is None else self._registered(store)
        registry = self._invocation.registry
        if wanted is None or step.action not in ("register", "take-over"):
            return
        registry.check(wanted.name, wanted.path, s3=wanted.s3)
        if wanted.s3 is None:
            from datastore.store import Datastore as Opened

            (await Opened.open(wanted.path)).close()
        else:
            from agent.bucket_stores import create

            await create(self._invocation, wanted, progress, reuse=True, overwrite_in_use=self._overwrite_in_use)
        registry.add(wanted.name, wanted.path, wanted.sync_level, s3=wanted.s3)
        if wanted.s3 is not None:
            await in_io_thread(_set_counters, wanted.path, store)


def _set_counters(cache: Path, store: PbsDatastore) -> None:
    """Thresholds of the counters, and when they are set back, as PBS has them."""
    from agent.s3_use import next_time
    from datastore.files import Owner
    from datastore.s3.counter_file import CounterFile

    file = CounterFile(cache, Owner.of(cache), next_time=next_time)
    if store.thresholds:
        file.set_thresholds(store.thresholds)
    if store.reset_schedule is not None:
        file.set_schedule(store.reset_schedule)
