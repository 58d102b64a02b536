"""Jobs of type backup: virtual machines, each with its hooks, retries and slots, and folders as one more guest.

Guests are independent: one that fails is tried again, then counted, and the others go on. The job has failed if any
has. docs/configuration.md, "Type backup".
"""

import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trio

from agent.errors import HookError, first_cause
from agent.vm_choice import ChosenVm, choose_vms
from core.errors import FleeceError, NotFoundError, UsageError
from core.limits import in_io_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from core.units import format_duration, parse_size
from datastore.names import BackupType, Group, Namespace, Snapshot

if TYPE_CHECKING:
    from agent.config import Config, KeySettings
    from agent.hooks import Hooks
    from agent.job_sections import BackupJob
    from agent.registry import Registry
    from agent.s3_use import S3Use
    from agent.slots import Slots
    from repository.report import BackupReport

#: Characters of an error in the result of a run.
_MAX_ERROR = 500


class Labelled(Progress):
    """Hands everything on with the name of a guest in front."""

    def __init__(self, other: Progress, label: str) -> None:
        super().__init__()
        self._other, self._label = other, label

    def task(self, name: str, total: int | None, unit: str = "bytes") -> Any:
        """See `Progress.task`."""
        return super().task(f"{self._label}: {name}", total, unit)

    def log(self, text: str) -> None:
        """See `Progress.log`."""
        self._other.log(f"{self._label}: {text}")

    def warn(self, text: str) -> None:
        """See `Progress.warn`."""
        super().warn(text)
        self._other.warn(f"{self._label}: {text}")

    def started(self, task: Task) -> None:
        """See `Progress.started`."""
        self._other.started(task)

    def changed(self, task: Task) -> None:
        """See `Progress.changed`."""
        self._other.changed(task)

    def ended(self, task: Task, *, ok: bool) -> None:
        """See `Progress.ended`."""
        self._other.ended(task, ok=ok)


@dataclass(frozen=True, slots=True)
class JobContext:
    """What a run of a job has around it."""

    name: str
    config: "Config"
    registry: "Registry"
    slots: "Slots"
    hooks: "Hooks"
    progress: Progress
    log_path: str
    s3: "Callable[[], S3Use] | None" = None  #: gives a new one for each backup
    guest_done: "Callable[[GuestResult], None]" = lambda result: None  #: told each guest's end


@dataclass(slots=True)
class GuestResult:
    """What became of one guest."""

    guest: str
    group: str = ""
    state: str = "failed"  #: `ok`, `warnings`, `failed`, `skipped`
    snapshot: str | None = None
    attempts: int = 0
    duration_s: float = 0.0
    read: int = 0
    new: int = 0
    size: int = 0  #: bytes of all its archives
    reused: int = 0
    stored: int = 0
    repository: str = ""
    ns: str = ""
    reasons: list[str] = field(default_factory=list)  #: why disks were read in full
    error: str | None = None
    s3: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Its element of `guests` in the result of a run."""
        document: dict[str, Any] = {
            "guest": self.guest,
            "group": self.group,
            "state": self.state,
            "snapshot": self.snapshot,
            "attempts": self.attempts,
            "duration-s": round(self.duration_s, 3),
            "read": self.read,
            "new": self.new,
            "reasons": self.reasons,
            "error": self.error,
            "repository": self.repository,
            "ns": self.ns,
            "size": self.size,
            "reused": self.reused,
            "stored": self.stored,
        }
        return document if self.s3 is None else {**document, "s3": self.s3}

    def take(self, report: "BackupReport", *, warned: bool) -> None:
        """Note that it was backed up."""
        self.state, self.error = "warnings" if warned else "ok", None
        self.read = sum(archive.read for archive in report.archives)
        self.new = sum(archive.new for archive in report.archives)
        self.size = sum(archive.size for archive in report.archives)
        self.reused = sum(archive.reused for archive in report.archives)
        self.stored = sum(archive.stored for archive in report.archives)
        found = [f"{one.name}: {one.reason}" for one in report.archives if one.reason is not None and one.chunks]
        self.reasons = found[:20]


class Guest(Protocol):
    """One thing that gets a snapshot of its own."""

    label: str
    id: str
    repository: str

    @property
    def group(self) -> Group:
        """Where its snapshots go."""
        ...

    async def mode(self) -> str | None:
        """`snapshot` or `stop` as vzdump has it; None if there is nothing to be backed up, which is no failure.

        Raises:
            FleeceError: it is not known how to reach it.
        """
        ...

    async def back_up(self, hooks: "Hooks", mode: str, seen: Callable[[Snapshot], None], p: Progress) -> "BackupReport":
        """Do it; `seen` is told the snapshot as soon as it has a name."""
        ...


async def run_backup_job(section: "BackupJob", context: JobContext) -> tuple[dict[str, Any], list[str]]:
    """Back up everything the job names; returns its figures, and which guests failed.

    Cancelled, backups under way clean up, and their guests are as before.

    Raises:
        FleeceError: nothing at all is to be backed up.
    """
    choice = await in_io_thread(choose_vms, context.config, section.vm, section.exclude_vm)
    for text in choice.idle:
        context.progress.warn(f"{text} matches no virtual machine")
    results = [
        GuestResult(text, error="the configuration has no such virtual machine") for text in choice.missing
    ]  # fmt: skip
    for one in results:
        context.progress.warn(f"{one.guest}: {one.error}")
    guests: list[Guest] = []
    groups: set[tuple[str, str, str]] = set()
    makers: list[tuple[str, Callable[[], Guest]]] = [
        (vm.label, lambda vm=vm: _VmGuest(vm, section, context)) for vm in choice.vms  # type: ignore[misc]
    ]  # fmt: skip
    if section.archives:
        makers.append(("archives", lambda: _ArchivesGuest(section, context)))
    for label, make in makers:
        try:
            guest = make()
            place = (guest.repository, str(guest.group.ns), str(guest.group))
            if place in groups:
                why = "another guest of this job has that id"
                raise UsageError("back up", str(guest.group), why, "write an id of its own into its section")
        except FleeceError as error:
            results.append(_failed(GuestResult(label), error))
            context.progress.warn(f"{label}: {error}")
            continue
        groups.add(place)
        guests.append(guest)
    if not guests and not results:
        raise NotFoundError("back up", context.name, "it chooses no virtual machine and no folder")
    for one in results:
        context.guest_done(one)
    results += await _all(guests, section, context)
    if all(one.state == "skipped" for one in results):
        # As for a pattern that matches nothing: a wrong socket in the configuration looks like a VM that is off.
        why = "nothing says where their disks are"
        context.progress.warn(f"nothing was backed up: none of the VMs that are chosen runs, and {why}")
    failed = [one.guest for one in results if one.state == "failed"]
    figures = {
        "ok": sum(one.state in ("ok", "warnings") for one in results),
        "failed": len(failed),
        "skipped": sum(one.state == "skipped" for one in results),
        "read": sum(one.read for one in results),
        "new": sum(one.new for one in results),
        "size": sum(one.size for one in results),
        "reused": sum(one.reused for one in results),
        "stored": sum(one.stored for one in results),
        "guests": [one.to_json() for one in results],
    }
    return figures, failed


async def _all(guests: Sequence[Guest], section: "BackupJob", context: JobContext) -> list[GuestResult]:
    """Every guest, `parallel` at a time, in order."""
    results = [
        GuestResult(guest.label, str(guest.group), repository=guest.repository, ns=str(guest.group.ns))
        for guest in guests
    ]
    waiting = iter(list(zip(guests, results, strict=True)))

    async def worker() -> None:
        for guest, result in waiting:
            await _with_retries(guest, result, section, context)
            context.guest_done(result)

    async with open_nursery() as nursery:
        for _ in range(min(section.parallel, len(guests))):
            nursery.start_soon(worker)
    return results


async def _with_retries(guest: Guest, result: GuestResult, section: "BackupJob", context: JobContext) -> None:
    from agent.cli_verify import parse_duration

    progress = Labelled(context.progress, guest.label)
    began = trio.current_time()
    wait_s = parse_duration(section.retry_wait)
    while True:
        result.attempts += 1
        try:
            await _attempt(guest, result, context, progress)
            break
        except Exception as error:
            cause = first_cause(error)
            if not isinstance(cause, FleeceError):
                why = f"something unexpected happened ({type(cause).__name__}: {cause})"
                cause = FleeceError("back up", guest.label, why)
            _failed(result, cause)
            # A hook or a configuration says the same the next time, and a snapshot that is listed is there.
            final = isinstance(cause, HookError | UsageError) or result.snapshot is not None
            if final or result.attempts > section.retries:
                progress.warn(f"failed: {cause}")
                break
            progress.log(f"failed: {cause}")
            progress.log(f"attempt {result.attempts + 1} of {section.retries + 1} in {format_duration(wait_s)}")
        await trio.sleep(wait_s)
    result.duration_s = trio.current_time() - began


def _failed(result: GuestResult, error: FleeceError) -> GuestResult:
    result.state, result.error = "failed", str(error)[:_MAX_ERROR]
    return result


async def _attempt(guest: Guest, result: GuestResult, context: JobContext, progress: Labelled) -> None:
    """One attempt, with its phases: whatever happens, `log-end` is the last."""
    from agent.slots import store_key

    mode = await guest.mode()
    if mode is None:
        result.state = "skipped"
        progress.log("it does not run, and nothing says where its disks are: left out")
        return
    async with context.slots.one(store_key(guest.repository, context.config, context.registry), progress.log):
        before = len(progress.warnings)
        kind = {"vm": "qemu", "ct": "lxc"}.get(guest.group.type.value, "host")
        hooks = context.hooks.of(progress.log, VMTYPE=kind, HOSTNAME=guest.label, **_store_id(guest.repository))
        target: dict[str, str] = {}
        listed: list[Snapshot] = []

        def seen(snapshot: Snapshot) -> None:
            target["TARGET"] = str(snapshot)

        try:
            await hooks.call("backup-start", mode, guest.id)
            report = await _into_repository(guest, hooks, mode, seen, listed, result, context, progress)
            result.take(report, warned=len(progress.warnings) > before)
            await hooks.finish("backup-end", mode, guest.id, **target)
        except BaseException as error:
            if listed:
                result.snapshot = str(listed[0])
            words = {"FLEECE_ERROR": str(first_cause(error))[:_MAX_ERROR].replace("\0", "")}
            await hooks.tell("backup-abort", mode, guest.id, **target, **words)
            raise
        finally:
            await hooks.tell("log-end", mode, guest.id, **target, LOGFILE=context.log_path)


async def _into_repository(
    guest: Guest,
    hooks: "Hooks",
    mode: str,
    seen: Callable[[Snapshot], None],
    listed: list[Snapshot],
    result: GuestResult,
    context: JobContext,
    progress: Progress,
) -> "BackupReport":
    report = await guest.back_up(hooks, mode, seen, progress)
    listed.append(report.snapshot)
    seen(report.snapshot)
    result.snapshot = str(report.snapshot)
    for line in report.lines():
        progress.log(line)
    return report


def _store_id(repository: str) -> dict[str, str]:
    """`STOREID`: the repository if it has a name; as vzdump, which gives none for a plain folder."""
    return {} if "/" in repository else {"STOREID": repository}


class _Target:
    """What guests of both kinds have in common: where they go, and with which key."""

    def __init__(self, section: "BackupJob", context: JobContext, own: "KeySettings | None", repository: str | None):
        spec = section.repository or repository or context.config.default_repository
        if spec is None:
            raise UsageError(
                "run the job", context.name, "it names no repository, and there is no default",
                f"write repository into [job.{context.name}], or default-repository at the top",
            )  # fmt: skip
        self.repository = spec
        self._section, self._context = section, context
        self._configured = context.config.repository.get(spec)
        self._levels: list[Any] = [
            one for one in (section, own, self._configured, context.config) if one is not None
        ]  # fmt: skip

    def first(self, name: str) -> Any:
        """The option `name` of the job, else of the guest, the repository, the top."""
        return next((value for one in self._levels if (value := getattr(one, name, None))), None)

    @property
    def ns(self) -> Namespace:
        """The namespace."""
        return Namespace.parse(next((one.ns for one in self._levels if getattr(one, "ns", None) is not None), ""))

    async def back_up(
        self,
        group: Group,
        work: "Callable[[Any, Any, Progress, Callable[[Snapshot], None]], Any]",
        progress: Progress,
    ) -> "BackupReport":
        """Open the repository and call `work` with it, the options of the snapshot, and what says that it is listed."""
        from agent.backup_runs import SnapshotOptions
        from agent.cli_verify import parse_duration
        from agent.keys import KeyOptions, backup_keys
        from agent.repositories import repository_at
        from agent.sessions import until_listed
        from datastore.session import DEFAULT_OWNER

        keys = backup_keys(
            KeyOptions(
                default_keyfile=self.first("keyfile"),
                default_master=self.first("master_pubkey_file"),
                default_mode=self.first("crypt_mode"),
            ),
            progress.log,
            attended=False,
        )
        limit = self.first("bwlimit")
        options = SnapshotOptions(
            group,
            self.first("owner") or DEFAULT_OWNER,
            keys,
            bwlimit=(parse_size(limit) or None) if limit is not None else None,
            notes=self._section.notes,
            lock_wait_s=parse_duration(self._section.lock_wait),
        )
        context = self._context
        use = None if context.s3 is None else context.s3()
        with until_listed(progress) as listed:
            async with AsyncExitStack() as stack:
                opening = repository_at(
                    self.repository, context.config, context.registry, None if use is None else lambda: use
                )
                repository = await stack.enter_async_context(opening)
                report: BackupReport = await work(repository, options, progress, listed)
        if use is not None and use.endpoint is not None:
            progress.log(use.line())
        return report


class _VmGuest:
    """A virtual machine."""

    def __init__(self, chosen: ChosenVm, section: "BackupJob", context: JobContext) -> None:
        from agent.vm_settings import resolve_vm

        self._settings = resolve_vm(context.config, chosen.options)
        self._certain = chosen.certain
        own = self._settings.section
        self._target = _Target(section, context, own, own.repository)
        self.label, self.id, self.repository = self._settings.label, self._settings.id, self._target.repository

    @property
    def group(self) -> Group:
        return self._settings.group(self._target.ns)

    async def mode(self) -> str | None:
        from agent.vm_backup import is_running

        try:
            return "snapshot" if await is_running(self._settings) else "stop"
        except (NotFoundError, UsageError):
            if self._certain:
                raise
            return None

    async def back_up(self, hooks: "Hooks", mode: str, seen: Callable[[Snapshot], None], p: Progress) -> "BackupReport":
        from agent.backup_runs import vm_into
        from agent.vm_backup import ViewHooks

        async def before(snapshot: Snapshot) -> None:
            seen(snapshot)
            await hooks.call("pre-stop", mode, self.id, TARGET=str(snapshot))

        async def after(snapshot: Snapshot) -> None:
            for phase in ("pre-restart", "post-restart"):
                await hooks.call(phase, mode, self.id, TARGET=str(snapshot))

        async def work(repository: Any, options: Any, progress: Progress, listed: Any) -> "BackupReport":
            return await vm_into(
                repository, self._settings, options, progress, on_listed=listed, hooks=ViewHooks(before, after)
            )

        return await self._target.back_up(self.group, work, p)


class _ArchivesGuest:
    """Folders, images and files: one snapshot."""

    def __init__(self, section: "BackupJob", context: JobContext) -> None:
        from agent.specifications import parse_specifications

        self._section, self._context = section, context
        self._specifications = parse_specifications(section.archives)
        self._target = _Target(section, context, None, None)
        self.id = section.backup_id or socket.gethostname().partition(".")[0]
        self.label, self.repository = self.id, self._target.repository

    @property
    def group(self) -> Group:
        return Group.parse(f"{BackupType(self._section.backup_type).value}/{self.id}", self._target.ns)

    async def mode(self) -> str | None:
        return "snapshot"

    async def back_up(self, hooks: "Hooks", mode: str, seen: Callable[[Snapshot], None], p: Progress) -> "BackupReport":
        from agent.archive_options import archive_options
        from agent.backup_runs import archives_into

        section = self._section
        folders = archive_options(
            mode=section.change_detection_mode or self._context.config.change_detection_mode,
            exclude=section.exclude,
            exclude_from=None,
            exclude_caches=section.exclude_caches,
            include_dev=section.include_dev,
            all_file_systems=section.all_file_systems,
            skip_lost_and_found=section.skip_lost_and_found,
            skip_e2big_xattr=False,
            entries_max=1 << 20,
            chunk_size=None,
        )

        async def work(repository: Any, options: Any, progress: Progress, listed: Any) -> "BackupReport":
            return await archives_into(repository, self._specifications, folders, options, progress, on_listed=listed)

        return await self._target.back_up(self.group, work, p)
