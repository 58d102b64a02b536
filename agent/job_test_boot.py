"""Jobs of type test-boot: the newest backup of each chosen machine is started, one after the other."""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.boot_trials import BootOrder, keep_evidence, parse_memory, parse_signs, try_snapshot
from agent.cli_verify import parse_duration
from agent.documents import in_namespace
from agent.keys import KeyOptions, reading_key
from core.errors import FleeceError
from core.limits import in_io_thread
from core.progress import Progress
from core.units import parse_size
from datastore.codec import ChunkCodec
from datastore.errors import SnapshotNotFoundError
from datastore.filters import GroupFilter, passes
from datastore.names import BackupType, Namespace, Snapshot
from repository.interface import Repository

if TYPE_CHECKING:
    from agent.job_sections import TestBootJob
    from agent.job_store import JobStore

#: Machines that the result lists.
_MAX_LISTED: Final = 100
#: Runs whose screens are kept.
_KEPT_RUNS: Final = 20


async def run_test_boots(
    section: "TestBootJob",
    ns: Namespace,
    repository: Repository,
    keyfile: Path | None,
    store: "JobStore",
    run_id: str,
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Start the newest backup of each chosen group; returns the figures for the history, and who did not live.

    The last screen of each is kept below the job's folder.

    Raises:
        FleeceError: the repository cannot be read, or the key.
    """
    order = BootOrder(
        parse_signs(section.wait),
        parse_duration(section.timeout),
        parse_duration(section.settle),
        None if section.memory is None else parse_memory(section.memory),
        section.cpus,
        section.accel,
        section.qemu,
        None,
        parse_size(section.space),
    )
    key = reading_key(KeyOptions(keyfile=section.keyfile, default_keyfile=keyfile), attended=False)
    if key.note:
        progress.log(key.note)
    screens = store.folder / "screens" / run_id.rpartition(":")[2]
    await in_io_thread(_make, screens)
    machines: list[dict[str, Any]] = []
    counts = {"ok": 0, "failed": 0, "skipped": 0}
    failed: list[str] = []
    for snapshot in await _newest(section, ns, repository):
        info = await repository.snapshot(snapshot)
        name = in_namespace(snapshot)
        if not any(file.filename.endswith(".img.fidx") for file in info.files):
            progress.log(f"{name} has no disk image and is passed over")
            counts["skipped"] += 1
            continue
        progress.log(f"{name} is started")
        one = await _one(repository, snapshot, order, key.codec(), screens, progress)
        counts["ok" if one["alive"] else "failed"] += 1
        if not one["alive"]:
            failed.append(name)
        progress.log(f"{name}: {'alive' if one['alive'] else 'NOT alive'}: {one['reason']}")
        machines.append(one)
    if not machines:
        # As a backup job that backs up nothing: a filter that means no group would say for ever that all is well.
        progress.warn("nothing was started: no group that is chosen has a backup with a disk image")
    return {**counts, "failed-snapshots": failed[:_MAX_LISTED], "machines": machines[:_MAX_LISTED]}, failed


async def _newest(section: "TestBootJob", ns: Namespace, repository: Repository) -> list[Snapshot]:
    filters = tuple(map(GroupFilter.parse, section.group_filter))
    found = []
    for namespace in await repository.namespaces(ns, depth=section.max_depth):
        try:
            groups = await repository.groups(namespace)
        except SnapshotNotFoundError:
            if namespace == ns:
                raise
            continue  # removed meanwhile
        for info in groups:
            if info.group.type is BackupType.VM and passes(filters, info.group):
                newest = await repository.latest(info.group)
                if newest is not None:
                    found.append(newest)
    return found


async def _one(
    repository: Repository, snapshot: Snapshot, order: BootOrder, codec: ChunkCodec, screens: Path, progress: Progress
) -> dict[str, Any]:
    name = in_namespace(snapshot)
    try:
        result = await try_snapshot(repository, snapshot, order, codec=codec, progress=progress)
        file = re.sub(r"[^A-Za-z0-9_.-]", "-", name.replace(":", ""))
        await keep_evidence(result, screens / f"{file}.png", screens / f"{file}.log", progress)
    except FleeceError as error:
        progress.log(f"{name}: {error}")
        return {"snapshot": name, "alive": False, "sign": None, "reason": str(error)[:500], "after-s": None}
    document = result.to_json()
    kept = ("alive", "sign", "reason", "after-s", "screenshot", "serial-log", "accel", "machine", "restarts", "written")
    return {"snapshot": name} | {part: document[part] for part in kept}


def _make(screens: Path) -> None:
    """The folder for this run; those of old ones go."""
    with suppress(OSError):
        screens.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = sorted(one for one in screens.parent.iterdir() if one != screens)
        for folder in old[: -(_KEPT_RUNS - 1)]:
            shutil.rmtree(folder, ignore_errors=True)
