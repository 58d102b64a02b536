"""What is known of each repository: space, contents, groups and their age, as of the last look.

Looking reads every manifest, so who shows the facts does not look: jobs do when they end, and the agent now and then in
a process of its own. `monitoring/stores/` of the state folder has a file for each repository.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agent.errors import first_cause
from agent.monitoring.state import read_document, write_document
from core.errors import FleeceError
from core.limits import in_io_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.config import Config
    from agent.registry import Registry
    from agent.s3_use import S3Use
    from datastore.names import Namespace
    from repository.interface import Repository, SnapshotInfo

#: Groups of one repository that are listed; of more only the sums are known.
MAX_GROUPS: Final = 5000
#: Seconds for one look; a server or disk that hangs must not hold up whoever waits.
LOOK_TIMEOUT_S: Final = 600.0
#: A look that took no longer is made after each job, others only when their time has come.
_QUICK_S: Final = 5.0
_MAX_ERROR: Final = 500


@dataclass(slots=True)
class _Group:
    snapshots: int = 0  #: finished ones
    unfinished: int = 0
    protected: int = 0
    failed: int = 0  #: of which verify says that they are damaged
    verified: int = 0  #: found to be sound
    oldest: int | None = None
    newest: int | None = None
    newest_size: int | None = None

    def take(self, info: "SnapshotInfo") -> None:
        self.protected += info.protected
        if not info.finished:
            self.unfinished += 1
            return
        ctime = info.snapshot.ctime
        state = (info.verification or {}).get("state")
        self.snapshots += 1
        self.failed += state == "failed"
        self.verified += state == "ok"
        self.oldest = ctime if self.oldest is None else min(self.oldest, ctime)
        if self.newest is None or ctime >= self.newest:
            self.newest, self.newest_size = ctime, info.size

    def to_json(self, ns: str, group: str) -> dict[str, Any]:
        return {
            "ns": ns,
            "group": group,
            "snapshots": self.snapshots,
            "unfinished": self.unfinished,
            "protected": self.protected,
            "verified": self.verified,
            "verify-failed": self.failed,
            "oldest": self.oldest,
            "newest": self.newest,
            "newest-size": self.newest_size,
        }


async def look_at(repository: "Repository") -> dict[str, Any]:
    """The facts of an open repository: what `datastore status` shows, and its groups.

    Raises:
        FleeceError: it cannot be read.
    """
    from agent.store_status import look, status_document

    groups: dict[tuple[str, str], _Group] = {}

    def seen(ns: "Namespace", infos: "Sequence[SnapshotInfo]") -> None:
        for info in infos:
            groups.setdefault((str(ns), str(info.snapshot.group)), _Group()).take(info)

    # A token that may only back up sees its own groups, and neither space nor garbage collections.
    status = status_document(await look(repository, seen, lenient=True))
    if not any(status[name] for name in ("total", "used", "avail")):
        status |= dict.fromkeys(("total", "used", "avail"))
    listed = [one.to_json(ns, group) for (ns, group), one in sorted(groups.items())[:MAX_GROUPS]]
    return {"status": status, "groups": listed, "groups-left-out": len(groups) - len(listed)}


class Surveys:
    """What is known of the repositories that this host uses."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "monitoring" / "stores"

    def _path(self, spec: str) -> Path:
        return self._folder / f"{hashlib.sha256(spec.encode('utf-8', 'replace')).hexdigest()[:24]}.json"

    def known(self, spec: str) -> dict[str, Any] | None:
        """The facts as of the last look; None if nobody has looked."""
        found = read_document(self._path(spec))
        return found if found is not None and found.get("repository") == spec else None

    def is_due(self, spec: str, interval_s: float, *, after_job: bool = False) -> bool:
        """Whether it is time to look again; after a job also if that is quick."""
        found = self.known(spec)
        looked, took = (found or {}).get("looked"), (found or {}).get("duration-s")
        if not isinstance(looked, int | float) or not isinstance(took, int | float):
            return True
        quick = after_job and took <= _QUICK_S and (found or {}).get("error") is None
        return quick or not 0 <= time.time() - looked < interval_s

    async def survey(
        self, spec: str, config: "Config", registry: "Registry", s3: "Callable[[], S3Use] | None" = None
    ) -> dict[str, Any]:
        """Look at the repository `spec`, and remember it; what fails is part of what is known.

        Returns: the facts; their `error` is null if the look succeeded, else the facts are those of an earlier one.

        Raises:
            FleeceError: the facts cannot be written.
        """
        from agent.repositories import repository_at

        began, start = time.time(), trio.current_time()
        facts: dict[str, Any] = {}
        error: str | None = None
        try:
            with trio.fail_after(LOOK_TIMEOUT_S):
                async with repository_at(spec, config, registry, s3) as repository:
                    facts = {**await look_at(repository), "time": began}
        except trio.TooSlowError:
            error = f"it did not answer in {LOOK_TIMEOUT_S:.0f} s"
        except Exception as failure:
            cause = first_cause(failure)
            known = isinstance(cause, FleeceError)
            error = str(cause)[:_MAX_ERROR] if known else f"something unexpected happened ({type(cause).__name__})"
        before = self.known(spec) or {}
        kept: Mapping[str, Any] = facts or {name: before.get(name) for name in ("status", "groups", "time")}
        document = {
            "schema": 1,
            "repository": spec,
            **kept,
            "looked": began,
            "duration-s": round(trio.current_time() - start, 3),
            "error": error,
        }
        await in_io_thread(write_document, self._path(spec), document)
        return document


def surveyed_repositories(config: "Config") -> list[str]:
    """The repositories that the jobs of this host use, and the default one, in the configuration's order."""
    from agent.job_sections import BackupJob

    specs = [] if config.default_repository is None else [config.default_repository]
    for section in config.job.values():
        if section.repository is not None:
            specs.append(section.repository)
        elif isinstance(section, BackupJob):
            specs += [vm.repository for vm in config.vm.values() if vm.repository is not None]
    return list(dict.fromkeys(specs))
