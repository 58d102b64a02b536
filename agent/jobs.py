"""Running jobs of the configuration: each type does what its command does, by the same functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import trio

from agent.errors import HookError, first_cause
from agent.hooks import Hook, Hooks, job_phases
from agent.job_sections import BackupJob, GcJob, PruneJob, RunnableJob, SyncJob, TestBootJob, VerifyJob
from agent.job_store import JobStore, Recording, Run
from agent.registry import Registry
from agent.repositories import repository_at
from agent.slots import Slots, store_key
from core.errors import FleeceError, UsageError
from core.progress import Progress, Task
from core.render import Lines
from core.units import format_duration
from datastore.names import Namespace
from repository.interface import Repository

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from agent.config import Config
    from agent.monitoring.reporter import JobReport
    from agent.s3_endpoints import EndpointRegistry
    from agent.s3_use import S3Use


class Both(Progress):
    """Hands everything on to several others."""

    def __init__(self, *others: Progress) -> None:
        super().__init__()
        self._others = others
        self._watchers: list[Callable[[str], None]] = []

    def watch(self, warned: "Callable[[str], None]") -> None:
        """Tell `warned` of each warning, too."""
        self._watchers.append(warned)

    def log(self, text: str) -> None:
        """See `Progress.log`."""
        for other in self._others:
            other.log(text)

    def warn(self, text: str) -> None:
        """See `Progress.warn`."""
        super().warn(text)
        for other in self._others:
            other.warn(text)
        for warned in self._watchers:
            warned(text)

    def started(self, task: Task) -> None:
        """See `Progress.started`."""
        for other in self._others:
            other.started(task)

    def changed(self, task: Task) -> None:
        """See `Progress.changed`."""
        for other in self._others:
            other.changed(task)

    def ended(self, task: Task, *, ok: bool) -> None:
        """See `Progress.ended`."""
        for other in self._others:
            other.ended(task, ok=ok)


def job_repository(name: str, section: RunnableJob, config: "Config") -> str:
    """The repository of a job: its own, else the configuration's default. The environment does not count.

    Raises:
        UsageError: neither is there.
    """
    spec = section.repository or config.default_repository
    if spec is None:
        raise UsageError(
            "run the job", name, "it names no repository, and there is no default",
            f"write repository into [job.{name}], or default-repository at the top",
        )  # fmt: skip
    return spec


async def run_job(
    name: str,
    section: RunnableJob,
    config: "Config",
    registry: Registry,
    store: JobStore,
    progress: Progress,
    *,
    endpoints: "EndpointRegistry | None" = None,
) -> Run:
    """Run a job once and record it; the run tells how it ended, a failure is raised after it was recorded.

    Cancelled, the work cleans up and the run counts as interrupted.

    Args:
        name: of the job.
        section: what it says.
        config: the rest of the configuration.
        registry: the datastores that commands made.
        store: where runs are recorded.
        progress: told how far it is.
        endpoints: for datastores in buckets; what they cost is in the log and the result.

    Raises:
        BusyError: it is running already.
        FleeceError: it failed.
    """
    with store.begin(section.type) as recording:
        log = Lines(cast("TextIO", recording.log), verbose=True)
        both = Both(progress, log)
        for problem in recording.problems:  # a full disk must not keep garbage collection from making room on it
            both.warn(problem)
        log.log(f"job {name} of type {section.type} begins as {recording.run.id}")
        hooks = job_hooks(section, config, recording, log)
        report = _report(recording.run, section, config, registry, endpoints, store, log)
        both.watch(report.warned)
        try:
            await report.began()
            failed: list[str] = []
            async with job_phases(hooks):
                if isinstance(section, BackupJob):
                    result, failed = await _backup(
                        name, section, config, registry, endpoints, hooks, both, store, recording, report
                    )
                else:
                    result = await _with_retries(
                        name, section, config, registry, endpoints, hooks, both, log, store, recording
                    )
            if failed:
                more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
                raise FailedJobError("back up", ", ".join(failed[:5]) + more, "failed", result)
        except BaseException as error:
            _record_failure(recording, log, error, both.warnings)
            await report.ended()
            raise
        log.log("ended with warnings" if both.warnings else "ended")
        try:
            recording.end("warnings" if both.warnings else "ok", warnings=both.warnings, result=result)
        except FleeceError as error:
            progress.warn(str(error))
        await report.ended()
        return recording.run


def _report(
    run: Run,
    section: RunnableJob,
    config: "Config",
    registry: Registry,
    endpoints: "EndpointRegistry | None",
    store: JobStore,
    log: Progress,
) -> "JobReport":
    from agent.monitoring.reporter import JobReport, Monitoring

    monitoring = Monitoring(config, registry, store.folder.parent.parent, log.log, endpoints)
    return JobReport(monitoring, run, section.repository or config.default_repository)


def job_hooks(section: RunnableJob, config: "Config", recording: Recording, log: Progress) -> Hooks:
    """The script that a run calls: the job's own, else the one of the top."""
    from agent.cli_verify import parse_duration

    path = section.hook or config.hook
    hook = None if path is None else Hook(path, parse_duration(section.hook_timeout or config.hook_timeout))
    variables = {"FLEECE_JOB": recording.run.job, "FLEECE_JOB_TYPE": section.type, "FLEECE_RUN": recording.run.id}
    if (spec := section.repository or config.default_repository) is not None and "/" not in spec:
        variables["STOREID"] = spec
    return Hooks(hook, log.log, variables)


def _slots(config: "Config") -> Slots:
    from agent.places import private_run_dir

    return Slots(private_run_dir() / "slots", config.limits.host, config.limits.store)


async def _backup(
    name: str,
    section: BackupJob,
    config: "Config",
    registry: Registry,
    endpoints: "EndpointRegistry | None",
    hooks: Hooks,
    progress: Progress,
    store: JobStore,
    recording: Recording,
    report: "JobReport",
) -> tuple[dict[str, Any], list[str]]:
    from agent.job_backup import JobContext, run_backup_job

    await hooks.call("job-start")
    s3 = None if endpoints is None else lambda: _one_use(endpoints, config, section, progress)
    log_path = str(store.log_path(recording.run.id))
    context = JobContext(name, config, registry, _slots(config), hooks, progress, log_path, s3, report.guest_done)
    return await run_backup_job(section, context)


def _one_use(endpoints: "EndpointRegistry", config: "Config", section: RunnableJob, progress: Progress) -> "S3Use":
    use = _s3_use(endpoints, config, section, progress)
    assert use is not None
    return use()


async def _with_retries(
    name: str,
    section: PruneJob | VerifyJob | GcJob | SyncJob | TestBootJob,
    config: "Config",
    registry: Registry,
    endpoints: "EndpointRegistry | None",
    hooks: Hooks,
    progress: Progress,
    log: Progress,
    store: JobStore,
    recording: Recording,
) -> dict[str, Any]:
    """The work of any type but backup, as often as the job says, until it is done."""
    from agent.cli_verify import parse_duration

    wait_s = parse_duration(section.retry_wait)
    started = False
    attempt = 1
    while True:
        use = _s3_use(endpoints, config, section, progress)
        try:
            spec = job_repository(name, section, config)
            async with _slots(config).one(store_key(spec, config, registry), progress.log):
                async with repository_at(spec, config, registry, use) as repository:
                    if not started:
                        await hooks.call("job-start")
                        started = True
                    if isinstance(section, SyncJob):
                        result = await _sync(section, spec, config, registry, repository, use, progress)
                    elif isinstance(section, TestBootJob):
                        result = await _test_boot(section, spec, config, repository, store, recording, progress)
                    else:
                        result = await _execute(section, spec, config, repository, progress)
                return result | _cost(use, log)
        except Exception as error:
            cause = first_cause(error)
            if isinstance(cause, FailedJobError):
                cause.result |= _cost(use, log)
            # Looking again does not heal a snapshot, and a hook or a configuration says the same the next time.
            final = isinstance(cause, HookError | UsageError) or (
                isinstance(section, VerifyJob) and isinstance(cause, FailedJobError)
            )
            if not isinstance(cause, FleeceError) or final or attempt > section.retries:
                raise
            progress.warn(f"failed: {cause}")
        attempt += 1
        progress.log(f"attempt {attempt} of {section.retries + 1} in {format_duration(wait_s)}")
        await trio.sleep(wait_s)


def _s3_use(
    endpoints: "EndpointRegistry | None", config: "Config", section: RunnableJob, progress: Progress
) -> "Callable[[], S3Use] | None":
    """What gives the one use of buckets of this run, made when it is asked for."""
    if endpoints is None:
        return None
    from functools import cache

    from agent.s3_budget import Budget
    from agent.s3_use import S3Use

    budget = None if section.s3_budget is None else Budget.parse(section.s3_budget)
    return cache(lambda: S3Use(endpoints, config.s3, budget=budget, warn=progress.warn))


def _cost(use: "Callable[[], S3Use] | None", log: Progress) -> dict[str, Any]:
    """What the run's result says of buckets: nothing if none was used."""
    if use is None or use().endpoint is None:
        return {}
    log.log(use().line())
    return {"s3": use().to_json()}


def _record_failure(recording: Recording, log: Progress, error: BaseException, warnings: Sequence[str]) -> None:
    cause = first_cause(error)
    # A group without a cause holds nothing but cancellations.
    interrupted = isinstance(cause, trio.Cancelled | BaseExceptionGroup)
    if isinstance(cause, FleeceError):
        failure = cause
    elif interrupted:
        failure = FleeceError("run the job", recording.run.job, "it was interrupted; everything was cleaned up")
    else:
        why = f"something unexpected happened ({type(cause).__name__}: {cause})"
        failure = FleeceError("run the job", recording.run.job, why)
    log.log(f"failed: {failure}")
    try:
        recording.end(
            "interrupted" if interrupted else "failed",
            warnings=list(warnings),
            error=failure,
            result=getattr(cause, "result", None),
        )
    except FleeceError as second:
        error.add_note(str(second))


class FailedJobError(FleeceError):
    """The work was done, and its result is that something is wrong."""

    def __init__(self, what: str, where: str, why: str, result: dict[str, Any]) -> None:
        super().__init__(what, where, why, "'fleece job log' has the details")
        self.result = result


async def _execute(
    section: PruneJob | VerifyJob | GcJob, spec: str, config: "Config", repository: Repository, progress: Progress
) -> dict[str, Any]:
    """Do what the job says; returns a few figures for its history."""
    if isinstance(section, GcJob):
        return await _collect(section, repository, progress)
    configured = config.repository.get(spec)
    ns = Namespace.parse(section.ns if section.ns is not None else configured.ns if configured is not None else "")
    if isinstance(section, PruneJob):
        return await _prune(section, ns, repository, progress)
    levels = [level for level in (section, configured, config) if level is not None]
    keyfile = next((level.keyfile for level in levels if level.keyfile), None)
    return await _verify(section, ns, repository, keyfile, progress)


async def _sync(
    section: SyncJob,
    spec: str,
    config: "Config",
    registry: Registry,
    repository: Repository,
    s3: "Callable[[], S3Use] | None",
    progress: Progress,
) -> dict[str, Any]:
    from agent.places import remotes_file, secrets_dir
    from agent.remote_hosts import RATES, RemoteRegistry
    from agent.syncing import FarSide, Known, failure, run_sync
    from datastore.filters import GroupFilter
    from datastore.session import DEFAULT_OWNER
    from repository.sync import Direction, SyncOptions

    direction = Direction(section.sync_direction)
    push = direction is Direction.PUSH
    known = Known(config, registry, RemoteRegistry(remotes_file(), secrets_dir()), s3)
    far = FarSide(section.remote, section.remote_store, {name: getattr(section, name) for name in RATES})
    near_section, far_section = config.repository.get(spec), config.repository.get(section.remote)
    here = Namespace.parse(
        section.ns if section.ns is not None else near_section.ns if near_section is not None else ""
    )
    there = far.default_ns(known) if section.remote_ns is None else Namespace.parse(section.remote_ns)
    written = far_section if push else near_section
    owner = section.owner or (written.owner if written is not None else None) or config.owner or DEFAULT_OWNER
    options = SyncOptions(
        direction,
        owner,
        source_ns=here if push else there,
        target_ns=there if push else here,
        max_depth=section.max_depth,
        filters=tuple(map(GroupFilter.parse, section.group_filter)),
        transfer_last=section.transfer_last,
        encrypted_only=section.encrypted_only,
        verified_only=section.verified_only,
        resync_corrupt=section.resync_corrupt,
        remove_vanished=section.remove_vanished,
        parallel=section.parallel,
        rate=far.throttle(direction, known),
    )
    report = await run_sync(repository, far, options, known, progress, may_ask=False)
    for line in report.lines(removal=options.remove_vanished):
        progress.log(line)
    figures = {
        "snapshots": len(report.snapshots),
        "bytes-sent": sum(one.sent for one in report.snapshots),
        "chunks-sent": sum(one.chunks_sent for one in report.snapshots),
        "skipped": report.skipped,
        "removed-snapshots": report.removed_snapshots,
        "removed-groups": len(report.removed_groups),
        "removed-namespaces": len(report.removed_namespaces),
        "failed": [f"{what}: {why}"[:500] for what, why in report.failed.items()][:100],
    }
    if report.failed:
        raise FailedJobError("push to" if push else "pull from", section.remote, f"failed: {failure(report)}", figures)
    return figures


async def _test_boot(
    section: TestBootJob,
    spec: str,
    config: "Config",
    repository: Repository,
    store: JobStore,
    recording: Recording,
    progress: Progress,
) -> dict[str, Any]:
    from agent.job_test_boot import run_test_boots

    configured = config.repository.get(spec)
    ns = Namespace.parse(section.ns if section.ns is not None else configured.ns if configured is not None else "")
    keyfile = next((one.keyfile for one in (configured, config) if one is not None and one.keyfile), None)
    figures, failed = await run_test_boots(section, ns, repository, keyfile, store, recording.run.id, progress)
    if failed:
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise FailedJobError("start", ", ".join(failed[:5]) + more, "it did not come to life", figures)
    return figures


async def _prune(section: PruneJob, ns: Namespace, repository: Repository, progress: Progress) -> dict[str, Any]:
    from agent.pruning import Selection, prune, prune_lines
    from datastore.filters import GroupFilter
    from datastore.prune import KeepOptions

    keep = KeepOptions(
        section.keep_last, section.keep_hourly, section.keep_daily,
        section.keep_weekly, section.keep_monthly, section.keep_yearly,
    )  # fmt: skip
    filters = tuple(map(GroupFilter.parse, section.group_filter))
    selection = Selection(ns, depth=section.max_depth, filters=filters)
    results = await prune(repository, selection, keep, dry_run=False, progress=progress)
    for line in prune_lines(results, dry_run=False):
        progress.log(line)
    return {
        "groups": len(results),
        "kept": sum(decision.keep for result in results for decision in result.decisions),
        "removed": sum(len(result.removed) for result in results),
        "failed": sum(len(result.failed) for result in results),
    }


async def _verify(
    section: VerifyJob, ns: Namespace, repository: Repository, keyfile: Path | None, progress: Progress
) -> dict[str, Any]:
    from agent.cli_verify import check_for_server, parse_duration
    from agent.documents import in_namespace
    from agent.keys import KeyOptions, reading_key
    from core.units import parse_size
    from datastore.filters import GroupFilter
    from repository.interface import ServerVerify
    from repository.verify import VerifyOptions, choose
    from repository.verify_modes import Mode, VerifyMode, verify_by

    mode = VerifyMode.parse(section.mode)
    options = VerifyOptions(
        ignore_verified=section.ignore_verified,
        outdated_after=section.outdated_after,
        max_duration_s=None if section.max_duration is None else parse_duration(section.max_duration),
        max_bytes=None if section.max_bytes is None else parse_size(section.max_bytes),
    )
    key = reading_key(KeyOptions(keyfile=section.keyfile, default_keyfile=keyfile), attended=False)
    if key.note:
        progress.log(key.note)
    codec = key.codec()
    filters = tuple(map(GroupFilter.parse, section.group_filter))
    if isinstance(repository, ServerVerify):
        check_for_server(options, full=mode.mode is Mode.FULL)
        results = await repository.verify_there(ns, options, progress, depth=section.max_depth, filters=filters)
    else:
        chosen = await choose(repository, ns, depth=section.max_depth, filters=filters)
        results = await verify_by(mode, repository, chosen, codec, progress, options)
    for one in results:
        skipped = f", not looked at: {one.skipped}" if one.skipped else ""
        progress.log(f"{in_namespace(one.snapshot)}: {one.state}{skipped}")
        for error in one.errors:
            progress.log(f"  {error}")
    failed = [in_namespace(one.snapshot) for one in results if one.state == "failed"]
    skipped_count = sum(bool(one.skipped) for one in results)
    figures = {
        "ok": len(results) - len(failed) - skipped_count,
        "failed": len(failed),
        "skipped": skipped_count,
        "failed-snapshots": failed[:100],
    }
    if failed:
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise FailedJobError("vouch for", ", ".join(failed[:5]) + more, "damaged", figures)
    return figures


async def _collect(section: GcJob, repository: Repository, progress: Progress) -> dict[str, Any]:
    from agent.cli_verify import parse_duration
    from datastore.gc import DEFAULT_CUTOFF_S, LOCK_WAIT_S, summary

    report = await repository.collect_garbage(
        cutoff_s=DEFAULT_CUTOFF_S if section.cutoff is None else int(parse_duration(section.cutoff)),
        lock_wait_s=LOCK_WAIT_S if section.lock_wait is None else parse_duration(section.lock_wait),
        allow_empty=section.allow_empty,
        progress=progress,
    )
    for line in summary(report):
        progress.log(line)
    return report.to_json()
