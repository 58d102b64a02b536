"""All that is known of jobs, guests and repositories of this host as one document: `fleece status`, `/status.json`.

Small files of the state folder are read, and the configuration; no repository is opened, and no guest asked.
docs/json.md, "Status", has the keys.
"""

import os
import socket
import time
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent.calendar_times import CalendarTimes
from agent.job_sections import BackupJob
from agent.job_store import JobStore
from agent.monitoring.rules import TargetStates
from agent.monitoring.state import read_document
from agent.monitoring.summaries import Summary, load_summary, uncounted
from agent.monitoring.survey import Surveys, surveyed_repositories
from agent.vm_choice import Selector, choose_vms
from core.errors import FleeceError

if TYPE_CHECKING:
    from agent.config import Config

#: Seconds without a sign of the agent after which it counts as gone.
_AGENT_PATIENCE_S: Final = 240.0
#: A backup is overdue if it is older than so many times the longest pause of its schedule, among so many.
_LATE: Final = 1.5
_GAPS: Final = 8
#: Seconds for which a guest is shown that no job means any more.
_FORGOTTEN_S: Final = 14 * 86_400.0


def overview(config: "Config", state_dir: Path, now: float | None = None) -> dict[str, Any]:
    """The document, as of `now` (Unix seconds). Reads files; call it in a thread where others wait."""
    moment = time.time() if now is None else now
    summaries = {name: load_summary(JobStore(state_dir, name)) for name in config.job}
    jobs = [_job(name, config, state_dir, summaries[name], moment) for name in config.job]
    coming = {job["job"]: job["next"] for job in jobs}
    surveys = Surveys(state_dir)
    specs = dict.fromkeys(surveyed_repositories(config))
    return {
        "schema": 1,
        "time": moment,
        "host": socket.gethostname(),
        "version": version(),
        "agent": agent_state(state_dir, moment),
        "jobs": jobs,
        "guests": _guests(config, summaries, coming, moment),
        "stores": [_store(surveys.known(spec), spec, moment) for spec in specs],
        "s3": _s3(summaries),
        "notifications": TargetStates(state_dir).figures(config.notify),
    }


@cache
def version() -> str:
    """Fleece's own."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("fleece")
    except PackageNotFoundError:
        return "unknown"


def agent_path(state_dir: Path) -> Path:
    """The file in which the agent says now and then that it runs."""
    return state_dir / "agent" / "status.json"


def agent_state(state_dir: Path, now: float) -> dict[str, Any]:
    """Whether the agent runs, since when, and why it could not take the configuration that is there."""
    found = read_document(agent_path(state_dir)) or {}
    since, seen, pid = (found.get(name) for name in ("since", "seen", "pid"))
    refused = found.get("refused")
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (since, seen, pid))
    alive = numbers and -60 <= now - float(seen or 0) < _AGENT_PATIENCE_S and _lives(pid)
    return {
        "running": bool(alive),
        "since": since if alive else None,
        "version": found.get("version") if alive else None,
        "refused": refused if alive and isinstance(refused, str) else None,
    }


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError, TypeError):
        return False
    return int(pid) > 0


def _job(name: str, config: "Config", state_dir: Path, summary: Summary | None, now: float) -> dict[str, Any]:
    section = config.job[name]
    store = JobStore(state_dir, name)
    due = None
    if section.schedule is not None:
        due = CalendarTimes.parse(section.schedule).after(now)
    running = store.running()
    if summary is None:  # from before summaries were kept, or damaged
        summary = Summary()
        try:
            for run in uncounted(None, store.runs()):
                summary.take(run)
        except FleeceError:
            pass
    return {
        "job": name,
        "type": section.type,
        "repository": section.repository or config.default_repository,
        "schedule": section.schedule,
        "comment": section.comment,
        "next": due,
        "running": running,
        "last-run": summary.last,
        "last-success": summary.last_success,
        "last-failure": summary.last_failure,
        "runs": dict(summary.runs),
        "totals": dict(summary.totals),
        "seconds": round(summary.seconds, 3),
    }


def _guests(
    config: "Config", summaries: Mapping[str, Summary | None], coming: Mapping[str, int | None], now: float
) -> list[dict[str, Any]]:
    """Every VM of the configuration, and what else jobs back up; those without a backup too."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    names: dict[str, list[str]] = {}  # label -> jobs that mean it
    groups = {label: f"vm/{vm.id or label}" for label, vm in config.vm.items()}
    unsure = set()  # jobs of which libvirt cannot say what they mean
    for name, section in config.job.items():
        if isinstance(section, BackupJob):
            try:
                meant = choose_vms(config, section.vm, section.exclude_vm).vms
            except FleeceError:
                unsure.add(name)
                known = [text for text in section.vm if Selector.parse(text).kind != "libvirt"]
                meant = choose_vms(config, known, section.exclude_vm).vms
            for chosen in meant:
                names.setdefault(chosen.label, []).append(name)
            if section.archives:
                label = section.backup_id or socket.gethostname().partition(".")[0]
                names.setdefault(label, []).append(name)
                groups.setdefault(label, f"{section.backup_type}/{label}")
    for job, summary in summaries.items():
        for key, one in summary.guests.items() if summary is not None else ():
            entry = _guest(one, job, now)
            # One that the job does not mean any more, or whose socket is gone, is shown for a while.
            gone = job not in unsure and job not in names.get(str(entry["guest"]), ())
            if gone and now - (entry["attempted"] or 0) > _FORGOTTEN_S:
                continue
            place = (str(entry["repository"]), str(entry["ns"]), str(entry["group"]) or key)
            other = found.get(place)
            if other is None or (other["attempted"] or 0) < (entry["attempted"] or 0):
                found[place] = entry
    seen = {str(entry["guest"]) for entry in found.values()}
    for label in [*config.vm, *names]:
        if label not in seen:
            seen.add(label)
            never = {"guest": label, "group": groups.get(label, f"vm/{label}"), "state": "never"}
            found[("", "", label)] = _guest(never, None, now)
    pauses = {name: _longest_gap(section.schedule, now) for name, section in config.job.items()}
    for entry in found.values():
        mine = names.get(str(entry["guest"])) or ([entry["job"]] if entry["job"] else [])
        dues = [(due, job) for job in mine if (due := coming.get(job)) is not None]
        entry["next"], entry["next-job"] = min(dues, default=(None, None))
        entry["jobs"] = mine
        gaps = [gap for job in mine if (gap := pauses[job]) is not None]
        late = entry["age-s"] is not None and bool(gaps) and entry["age-s"] > _LATE * min(gaps)
        entry["overdue"] = late
    return sorted(found.values(), key=lambda entry: (str(entry["guest"]), str(entry["group"])))


def _longest_gap(schedule: str | None, now: float) -> float | None:
    """Seconds between two times of a schedule, the longest one of those that come next."""
    if schedule is None:
        return None
    times, moments = CalendarTimes.parse(schedule), [now]
    for _ in range(_GAPS + 1):
        found = times.after(moments[-1])
        if found is None:
            break
        moments.append(found)
    gaps = [two - one for one, two in pairwise(moments[1:])]
    return max(gaps, default=None)


def _guest(one: Mapping[str, Any], job: str | None, now: float) -> dict[str, Any]:
    backup = one.get("backup")
    backup = backup if isinstance(backup, dict) else {}
    when = backup.get("time")
    reasons = backup.get("reasons")
    return {
        "guest": one.get("guest"),
        "repository": one.get("repository"),
        "ns": one.get("ns") or "",
        "group": one.get("group") or "",
        "job": job,
        "state": one.get("state"),
        "error": one.get("error"),
        "attempted": one.get("attempted"),
        "snapshot": backup.get("snapshot"),
        "time": when,
        "age-s": round(now - when) if isinstance(when, int | float) else None,
        **{name: backup.get(name) for name in ("size", "read", "new", "stored", "duration-s")},
        "reasons": [str(text) for text in reasons] if isinstance(reasons, list) else [],
    }


def _store(known: dict[str, Any] | None, spec: str, now: float) -> dict[str, Any]:
    facts = known or {}
    when = facts.get("time")
    status = facts.get("status")
    groups = facts.get("groups")
    return {
        "repository": spec,
        "looked": facts.get("looked"),
        "error": facts.get("error"),
        "time": when,
        "age-s": round(now - when) if isinstance(when, int | float) else None,
        "duration-s": facts.get("duration-s"),
        "status": status if isinstance(status, dict) else None,
        "groups": [one for one in groups if isinstance(one, dict)] if isinstance(groups, list) else [],
        "groups-left-out": facts.get("groups-left-out") or 0,
    }


def _s3(summaries: Mapping[str, Summary | None]) -> list[dict[str, Any]]:
    """What jobs have needed of each endpoint in all."""
    found: dict[str, dict[str, Any]] = {}
    for summary in summaries.values():
        for endpoint, one in summary.s3.items() if summary is not None else ():
            total = found.setdefault(endpoint, {"endpoint": endpoint, "requests": {}, "uploaded": 0, "downloaded": 0})
            for method, count in one["requests"].items():
                total["requests"][method] = total["requests"].get(method, 0) + count
            for name in ("uploaded", "downloaded"):
                total[name] += one[name]
    return [found[endpoint] for endpoint in sorted(found)]
