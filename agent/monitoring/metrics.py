"""What is known of jobs, guests and repositories in Prometheus's text format. docs/monitoring.md lists all names.

Base units (seconds, bytes), `_total` on what only grows, a state as one series per state with 0 or 1, and no series
where nothing is known.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from agent.monitoring.state import replace_file
from agent.monitoring.summaries import GOOD, STATES, number

if TYPE_CHECKING:
    from pathlib import Path

    from prometheus_client.core import Metric

#: Groups of all repositories together that get series of their own.
MAX_GROUPS: Final = 5000
#: Characters of a label.
_MAX_LABEL: Final = 256
#: node_exporter runs as another user.
_TEXTFILE_MODE: Final = 0o644
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
Labels = Sequence[str]
#: What is added up of the runs of each type: figure of the result, name and help of the counter.
_TOTALS: Final[Mapping[str, Sequence[tuple[str, str, str]]]] = {
    "backup": (
        ("size", "fleece_job_source_bytes", "Bytes of all that a job has backed up."),
        ("read", "fleece_job_read_bytes", "Bytes that backups of a job have read from their sources."),
        ("new", "fleece_job_new_bytes", "Bytes of a job's backups that the repository did not have, plain."),
        ("reused", "fleece_job_reused_bytes", "Bytes of a job's backups that the repository had already, plain."),
        ("stored", "fleece_job_stored_bytes", "Bytes that a job's backups have stored, compressed."),
    ),
    "sync": (
        ("bytes-sent", "fleece_job_sync_bytes", "Bytes that a job has sent to, or fetched from, another datastore."),
        ("chunks-sent", "fleece_job_sync_chunks", "Chunks that a job has sent to, or fetched from, another datastore."),
    ),
    "prune": (("removed", "fleece_job_removed_snapshots", "Snapshots that a job has removed."),),
    "gc": (
        ("removed-chunks", "fleece_job_removed_chunks", "Chunks that garbage collections of a job have removed."),
        ("removed-bytes", "fleece_job_removed_bytes", "Bytes that garbage collections of a job have removed."),
    ),
}


class _Families:
    """Collects samples by name."""

    def __init__(self) -> None:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self._kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        self._found: dict[str, Any] = {}
        self._seen: set[tuple[str, ...]] = set()

    def add(self, kind: str, name: str, help: str, value: Any, **labels: Any) -> None:
        """One sample; nothing if `value` is no number."""
        if isinstance(value, bool):
            value = int(value)
        if not isinstance(value, int | float) or value != value:
            return
        family = self._found.get(name)
        if family is None:
            family = self._found[name] = self._kinds[kind](name, help, labels=list(labels))
        shown = [_label(label) for label in labels.values()]
        # Two series of one name would make Prometheus refuse everything: names that are cut may become the same.
        if (name, *shown) not in self._seen:
            self._seen.add((name, *shown))
            family.add_metric(shown, float(value))

    def gauge(self, name: str, help: str, value: Any, **labels: Any) -> None:
        self.add("gauge", name, help, value, **labels)

    def counter(self, name: str, help: str, value: Any, **labels: Any) -> None:
        self.add("counter", name, help, value, **labels)

    def collect(self) -> "Iterable[Metric]":
        return self._found.values()


def _label(value: Any) -> str:
    """A label's value: in principle any text; what is not printable is shown as in the page."""
    text = ("" if value is None else str(value))[:_MAX_LABEL]
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def render(document: Mapping[str, Any]) -> bytes:
    """The exposition of what `overview` gives."""
    from prometheus_client.exposition import generate_latest
    from prometheus_client.registry import CollectorRegistry

    families = _Families()
    _host(families, document)
    for job in document["jobs"]:
        _job(families, job)
    for guest in document["guests"]:
        _guest(families, guest)
    left = MAX_GROUPS
    for store in document["stores"]:
        left = _store(families, store, left)
    for one in document["s3"]:
        _s3(families, one)
    for target in document["notifications"]:
        _notification(families, target)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(families)
    return generate_latest(registry)


def _host(add: _Families, document: Mapping[str, Any]) -> None:
    agent = document["agent"]
    add.gauge("fleece_build_info", "Version of Fleece.", 1, version=document["version"])
    add.gauge("fleece_metrics_timestamp_seconds", "When these figures were collected.", document["time"])
    add.gauge("fleece_agent_up", "Whether the agent runs.", agent["running"])
    add.gauge("fleece_agent_start_timestamp_seconds", "When the agent was started.", agent["since"])
    refused = None if not agent["running"] else agent["refused"] is not None
    add.gauge("fleece_agent_configuration_refused", "Whether the agent could not take the last configuration.", refused)


def _job(add: _Families, job: Mapping[str, Any]) -> None:
    name, last = job["job"], job["last-run"]
    add.gauge(
        "fleece_job_info", "A job of the configuration.", 1,
        job=name, type=job["type"], repository=job["repository"], schedule=job["schedule"],
    )  # fmt: skip
    add.gauge("fleece_job_running", "Whether a job runs.", job["running"], job=name)
    add.gauge("fleece_job_next_run_timestamp_seconds", "When a job is due next.", job["next"], job=name)
    success = "End of a job's last run that was done, with warnings or without."
    add.gauge("fleece_job_last_success_timestamp_seconds", success, job["last-success"], job=name)
    failure = "End of a job's last run that failed or was killed."
    add.gauge("fleece_job_last_failure_timestamp_seconds", failure, job["last-failure"], job=name)
    for state in STATES:
        help = "Runs of a job that have ended, by how."
        add.counter("fleece_job_runs", help, number(job["runs"].get(state)), job=name, state=state)
    add.counter("fleece_job_duration_seconds", "Seconds that all runs of a job have taken.", job["seconds"], job=name)
    for figure, metric, help in _TOTALS.get(job["type"], ()):
        add.counter(metric, help, number(job["totals"].get(figure)), job=name)
    if not isinstance(last, dict):
        return
    for state in STATES:
        help = "How a job's last run ended: 1 for that state."
        add.gauge("fleece_job_last_run_state", help, last.get("state") == state, job=name, state=state)
    start = "Begin of a job's last run that has ended."
    add.gauge("fleece_job_last_run_start_timestamp_seconds", start, last.get("start"), job=name)
    took = "How long a job's last run took."
    add.gauge("fleece_job_last_run_duration_seconds", took, last.get("duration-s"), job=name)
    warnings = "Warnings of a job's last run."
    add.gauge("fleece_job_last_run_warnings", warnings, last.get("warning-count"), job=name)
    result = last.get("result")
    if not isinstance(result, dict):
        return
    for figure in ("size", "read", "new"):
        if job["type"] == "backup" and figure in result:
            help = f"Bytes of a job's last run: {figure}."
            add.gauge(f"fleece_job_last_run_{figure}_bytes", help, number(result[figure]), job=name)
    what = "guests" if job["type"] == "backup" else "snapshots"
    for state in ("ok", "failed", "skipped") if job["type"] in ("backup", "verify", "test-boot") else ():
        help = f"What became of the {what} of a job's last run."
        add.gauge(f"fleece_job_last_run_{what}", help, number(result.get(state)), job=name, state=state)


def _guest(add: _Families, guest: Mapping[str, Any]) -> None:
    labels = {name: guest[name] for name in ("guest", "repository", "ns", "group")}
    add.gauge("fleece_guest_last_attempt_timestamp_seconds", "When a guest's last backup ended, whatever came of it.",
              guest["attempted"], **labels)  # fmt: skip
    if guest["attempted"] is not None:
        help = "Whether a guest's last backup is done."
        add.gauge("fleece_guest_last_attempt_success", help, guest["state"] in GOOD, **labels)
    if guest["time"] is None:
        return
    late = "Whether a guest's last backup that is done is older than the schedules of its jobs allow."
    add.gauge("fleece_guest_backup_overdue", late, guest["overdue"], **labels)
    prefix, of = "fleece_guest_last_backup", "of a guest's last backup that is done"
    add.gauge(f"{prefix}_timestamp_seconds", f"End {of}.", guest["time"], **labels)
    add.gauge(f"{prefix}_duration_seconds", f"Duration {of}.", guest["duration-s"], **labels)
    for name in ("size", "read", "new", "stored"):
        add.gauge(f"{prefix}_{name}_bytes", f"Bytes {of}: {name}.", guest[name], **labels)
    add.gauge(f"{prefix}_full_disks", f"Disks {of} that were read in full.", len(guest["reasons"]), **labels)


def _store(add: _Families, store: Mapping[str, Any], left: int) -> int:
    """Series of one repository; returns how many groups may still have some."""
    spec = store["repository"]
    looked = store["looked"]
    add.gauge(
        "fleece_datastore_survey_timestamp_seconds", "When a repository was looked at last.", looked, repository=spec
    )
    if looked is not None:
        help = "Whether the last look at a repository succeeded; if not, the figures are older ones."
        add.gauge("fleece_datastore_up", help, store["error"] is None, repository=spec)
        took = "How long the last look at a repository took."
        add.gauge("fleece_datastore_survey_duration_seconds", took, store["duration-s"], repository=spec)
    status = store["status"]
    if status is None:
        return left
    for key, name, help in (
        ("total", "size_bytes", "Space where a datastore lies; 0 if it has no limit."),
        ("used", "used_bytes", "Space that is used where a datastore lies."),
        ("avail", "available_bytes", "Space that is left where a datastore lies."),
        ("deduplication-factor", "dedup_ratio", "How often the data would be stored without deduplication and "
                                                "compression, as of the last garbage collection."),
        ("unfinished", "unfinished_snapshots", "Snapshots that are being written, or that a crash left."),
        ("protected", "protected_snapshots", "Snapshots that cannot be removed."),
        ("namespaces", "namespaces", "Namespaces, without the root."),
        ("last-gc", "last_gc_timestamp_seconds", "Begin of the last garbage collection."),
        ("estimated-full-date", "estimated_full_timestamp_seconds", "When the space will be used up, by an estimate."),
    ):  # fmt: skip
        add.gauge(f"fleece_datastore_{name}", help, status.get(key), repository=spec)
    counts = status.get("counts")
    for kind, one in counts.items() if isinstance(counts, dict) else ():
        for name in ("groups", "snapshots"):
            help = f"{name.capitalize()} of a datastore, by type of backup."
            add.gauge(f"fleece_datastore_{name}", help, one.get(name), repository=spec, type=kind)
    verification = status.get("verification")
    for state, count in verification.items() if isinstance(verification, dict) else ():
        help = "Snapshots by what their last verification found."
        add.gauge("fleece_datastore_verified_snapshots", help, count, repository=spec, state=state)
    help = "Groups of a datastore that are too many to have series of their own."
    groups = store["groups"]
    shown = groups[:left]
    add.gauge("fleece_datastore_groups_left_out", help, len(groups) - len(shown) + number(store["groups-left-out"]),
              repository=spec)  # fmt: skip
    for one in shown:
        labels = {"repository": spec, "ns": one.get("ns"), "group": one.get("group")}
        for key, name, help in (
            ("snapshots", "snapshots", "Snapshots of a group."),
            ("newest", "newest_timestamp_seconds", "Time of a group's newest snapshot."),
            ("oldest", "oldest_timestamp_seconds", "Time of a group's oldest snapshot."),
            ("newest-size", "newest_size_bytes", "Size of a group's newest snapshot."),
            ("verify-failed", "verify_failed_snapshots", "Snapshots of a group that are damaged."),
        ):
            add.gauge(f"fleece_group_{name}", help, one.get(key), **labels)
    return left - len(shown)


def _s3(add: _Families, one: Mapping[str, Any]) -> None:
    endpoint = one["endpoint"]
    for method, count in sorted(one["requests"].items()):
        help = "Requests that jobs have made to an S3 endpoint."
        add.counter("fleece_s3_requests", help, count, endpoint=endpoint, method=method)
    add.counter(
        "fleece_s3_sent_bytes", "Bytes that jobs have sent to an S3 endpoint.", one["uploaded"], endpoint=endpoint
    )
    add.counter("fleece_s3_received_bytes", "Bytes that jobs have received from an S3 endpoint.", one["downloaded"],
                endpoint=endpoint)  # fmt: skip


def _notification(add: _Families, target: Mapping[str, Any]) -> None:
    name = target["name"]
    for outcome in ("sent", "failed", "left-out"):
        help = "Notifications that were sent, that failed (each attempt of a run), and that were left out."
        add.counter("fleece_notifications", help, target[outcome], notification=name, outcome=outcome.replace("-", "_"))
    help = "Notifications that wait for another attempt."
    add.gauge("fleece_notifications_pending", help, target["pending"], notification=name)
    sent = "When a notification was sent last."
    add.gauge("fleece_notification_last_sent_timestamp_seconds", sent, target["last-sent"], notification=name)


def write_textfile(path: "Path", document: Mapping[str, Any]) -> None:
    """Replace node_exporter's file at once, readable for everybody; its collector does not see the temporary one.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    replace_file(path, render(document), _TEXTFILE_MODE)
