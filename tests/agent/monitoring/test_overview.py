"""All that is known as one document, as metrics and as a page: complete, and safe whatever it holds."""

import base64
import hashlib
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from agent.config import Config
from agent.job_store import JobStore
from agent.monitoring.metrics import render, write_textfile
from agent.monitoring.overview import agent_path, overview
from agent.monitoring.page import POLICY, find_problems, render_page, shown
from agent.monitoring.rules import TargetStates
from agent.monitoring.state import write_document
from agent.monitoring.summaries import Summary, save_summary
from agent.monitoring.survey import Surveys
from tests.support.cache import ROOT

from .conftest import HOSTILE, a_run, config
from .test_summaries import S3, backed_up

NOW = 1_800_000_000.0
TEXT = """
default-repository = "main"
[repository.main]
path = "/nowhere"
[vm.web]
qmp = "/run/web.qmp"
tags = ["prod"]
[vm.db]
id = "102"
[vm.alone]
[job.night]
type = "backup"
schedule = "02:00 UTC"
vm = ["tag:prod", "db"]
[job.later]
type = "backup"
schedule = "23:00 UTC"
vm = ["web"]
[job.sweep]
type = "gc"
schedule = "weekly"
[job.files]
type = "backup"
archives = ["etc.pxar:/etc"]
backup-id = "box"
[notify.x]
type = "mail"
to = "root"
"""
STATUS = {
    "store": "main", "total": 1000, "used": 950, "avail": 50, "namespaces": 1, "unfinished": 0, "protected": 2,
    "counts": {"vm": {"groups": 2, "snapshots": 5}, "ct": {"groups": 0, "snapshots": 0}},
    "verification": {"ok": 3, "failed": 1, "none": 1}, "last-gc": NOW - 60, "deduplication-factor": 12.5,
    "estimated-full-date": None,
}  # fmt: skip
GROUP = {"ns": HOSTILE, "group": "vm/web", "snapshots": 5, "oldest": 1, "newest": NOW, "newest-size": 7,
         "verify-failed": 1, "unfinished": 0, "protected": 0, "verified": 3}  # fmt: skip


def at(moment: float, run: Any) -> Any:
    run.start, run.end = moment - 60, moment
    return run


def known(folder: Path, settings: Config) -> dict[str, Any]:
    """A host that has seen something of everything."""
    night, files, sweep = Summary(), Summary(), Summary()
    night.take(at(NOW - 3 * 86_400, backed_up(guest="web")))
    night.take(at(NOW - 3600, backed_up("failed", guest="db", number=2, group="vm/102", error=HOSTILE)))
    files.take(at(NOW - 7200, backed_up(guest="box", group=HOSTILE, repository=HOSTILE)))
    sweep.take(at(NOW - 60, a_run("failed", job="sweep", result={"removed-bytes": 7, "s3": S3})))
    for name, summary in (("night", night), ("files", files), ("sweep", sweep)):
        save_summary(JobStore(folder, name), summary)
    surveys = Surveys(folder)
    write_document(
        surveys._path("main"),
        {"repository": "main", "looked": NOW - 30, "time": NOW - 30, "duration-s": 0.5, "error": None, "status": STATUS,
         "groups": [GROUP], "groups-left-out": 0},
    )  # fmt: skip
    states = TargetStates(folder)
    (message,) = states.decide("x", settings.notify["x"], [("night", "night:1", "failed")], NOW)
    states.done("x", message, HOSTILE, NOW)
    return overview(settings, folder, NOW)


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    return known(tmp_path, config(TEXT))


def test_every_guest_is_there_with_its_last_backup_its_next_run_and_what_is_wrong(document: dict[str, Any]) -> None:
    guests = {guest["guest"]: guest for guest in document["guests"]}
    assert list(guests) == ["alone", "box", "db", "web"]
    web = guests["web"]
    assert (web["group"], web["repository"], web["state"], web["age-s"]) == ("vm/web", "main", "ok", 3 * 86_400)
    assert (web["size"], web["read"], web["reasons"]) == (100, 50, ["drive: no bitmap"])
    assert web["jobs"] == ["night", "later"]
    # 08:00 UTC: the later job comes first.
    assert (web["next-job"], time.gmtime(web["next"])[3]) == ("later", 23)
    assert web["overdue"], "three days old, and due twice a day"
    db = guests["db"]
    assert (db["state"], db["error"], db["time"], db["next-job"]) == ("failed", HOSTILE, None, "night")
    assert (guests["alone"]["state"], guests["alone"]["jobs"]) == ("never", [])
    assert (guests["box"]["jobs"], guests["box"]["next"], guests["box"]["overdue"]) == (["files"], None, False)
    json.dumps(document, allow_nan=False)
    problems = [text for _, text in find_problems(document)]
    assert problems[:2] == ["repository main: 1 snapshot is damaged", "repository main: 95 % of the space is used"]
    for text in ("alone: no job backs it up", "db: the last backup has failed", "web: the last backup is 3 d 00 h old",
                 "job sweep: the last run has failed"):  # fmt: skip
        assert text in problems
    assert any("the agent does not run" in text for text in problems)


def test_a_host_that_has_seen_nothing_has_a_document_metrics_and_a_page(tmp_path: Path) -> None:
    for text in ("", TEXT):
        document = overview(config(text), tmp_path, NOW)
        assert render(document)
        assert "</html>" in render_page(document)
    guests = overview(config(TEXT), tmp_path, NOW)["guests"]
    assert {(guest["guest"], guest["state"], guest["group"]) for guest in guests} == {
        ("web", "never", "vm/web"), ("db", "never", "vm/102"), ("alone", "never", "vm/alone"),
        ("box", "never", "host/box"),
    }  # fmt: skip


def test_libvirt_that_does_not_answer_hides_neither_the_rest_nor_what_is_known_of_its_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nonexistent/sock")
    settings = config(TEXT.replace('vm = ["tag:prod", "db"]', 'vm = ["tag:prod", "libvirt:*"]'))
    night = Summary()
    night.take(at(NOW - 60 * 86_400, backed_up(guest="domain", group="vm/domain")))
    save_summary(JobStore(tmp_path, "night"), night)
    guests = {guest["guest"]: guest for guest in overview(settings, tmp_path, NOW)["guests"]}
    assert set(guests) == {"alone", "box", "db", "domain", "web"}
    assert guests["domain"]["overdue"]
    assert guests["web"]["jobs"] == ["night", "later"]


def test_the_agent_is_up_as_long_as_it_says_so(tmp_path: Path) -> None:
    for sign, up in (
        ({"since": NOW - 100, "seen": NOW - 30, "pid": os.getpid(), "version": "1"}, True),
        ({"since": NOW - 1000, "seen": NOW - 900, "pid": os.getpid(), "version": "1"}, False),
        ({"since": NOW - 100, "seen": NOW - 30, "pid": 2**22 + 1, "version": "1"}, False),
        ({"since": NOW, "seen": "x", "pid": 1}, False),
        ({"since": NOW, "seen": NOW, "pid": -1}, False),
    ):
        write_document(agent_path(tmp_path), sign)
        assert overview(config(""), tmp_path, NOW)["agent"]["running"] is up


def test_an_agent_that_goes_on_with_an_old_configuration_is_told_of(tmp_path: Path) -> None:
    sign: dict[str, Any] = {"since": NOW - 100, "seen": NOW - 30, "pid": os.getpid(), "version": "1"}
    for refused, told in ((None, False), ("fleece.toml:3: no valid TOML", True), (5, False)):
        write_document(agent_path(tmp_path), {**sign, "refused": refused})
        document = overview(config(""), tmp_path, NOW)
        assert values(families(document)["fleece_agent_configuration_refused"]) == [told]
        problem = ("bad", f"the agent goes on with an old configuration: {refused}")
        assert (problem in find_problems(document)) is told


def families(document: dict[str, Any]) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(render(document).decode())}


def values(family: Metric, **labels: str) -> list[float]:
    return [one.value for one in family.samples if labels.items() <= one.labels.items()]


def test_metrics_say_what_is_known(document: dict[str, Any]) -> None:
    found = families(document)
    assert values(found["fleece_job_last_success_timestamp_seconds"], job="night") == [NOW - 3 * 86_400]
    assert values(found["fleece_job_runs"], job="night", state="failed") == [1]
    assert values(found["fleece_job_last_run_state"], job="night") == [0, 0, 1, 0, 0]
    assert values(found["fleece_job_last_run_duration_seconds"], job="sweep") == [60]
    assert values(found["fleece_job_read_bytes"], job="night") == [100]
    assert values(found["fleece_job_removed_bytes"], job="sweep") == [7]
    assert values(found["fleece_guest_last_backup_timestamp_seconds"], guest="web") == [NOW - 3 * 86_400]
    assert values(found["fleece_guest_last_attempt_success"], guest="db") == [0]
    assert values(found["fleece_guest_backup_overdue"], guest="web") == [1]
    assert values(found["fleece_datastore_up"], repository="main") == [1]
    assert values(found["fleece_datastore_size_bytes"]) == [1000]
    assert values(found["fleece_datastore_dedup_ratio"]) == [12.5]
    assert values(found["fleece_datastore_snapshots"], type="vm") == [5]
    assert values(found["fleece_datastore_verified_snapshots"], state="failed") == [1]
    assert "fleece_datastore_estimated_full_timestamp_seconds" not in found, "what is not known is no series"
    assert values(found["fleece_group_newest_timestamp_seconds"]) == [NOW]
    assert values(found["fleece_s3_requests"], endpoint="aws", method="put") == [8]
    assert values(found["fleece_notifications"], outcome="failed") == [1]
    assert values(found["fleece_agent_up"]) == [0]


def test_names_and_types_follow_the_rules_of_prometheus_and_are_documented(document: dict[str, Any]) -> None:
    documented = set(re.findall(r"`(fleece_[a-z0-9_]+)`", (ROOT / "docs/monitoring.md").read_text()))
    exposed = set()
    for name, family in families(document).items():
        counter = family.type == "counter"
        assert family.type in ("counter", "gauge")
        assert re.fullmatch(r"fleece_[a-z0-9]+(_[a-z0-9]+)*", name)
        assert family.documentation.endswith("."), name
        assert not re.search(r"_(ms|kb|mb|percent|count)$", name), "base units"
        exposed.add(f"{name}_total" if counter else name)
        assert len({tuple(sorted(sample.labels.items())) for sample in family.samples}) == len(family.samples), name
    assert exposed <= documented


def test_hostile_labels_are_carried_as_they_are(document: dict[str, Any]) -> None:
    found = families(document)
    (sample,) = [one for one in found["fleece_group_snapshots"].samples if one.labels["group"] == "vm/web"]
    assert sample.labels["ns"].startswith("web\\u000d\\u000aBcc: all@example.org")
    assert sample.labels["ns"].endswith('</script>\\u202e\\u001b[2J"&$job${')
    # Names that look the same when they are cut do not make the whole exposition worthless.
    document["guests"] = [document["guests"][3] | {"guest": "\udcff" + "x" * 1000 + end} for end in "ab"]
    assert len(families(document)["fleece_guest_backup_overdue"].samples) == 1


def test_many_groups_do_not_flood_the_server_that_scrapes(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.monitoring.metrics.MAX_GROUPS", 3)
    document["stores"][0]["groups"] = [GROUP | {"group": f"vm/{number}"} for number in range(10)]
    found = families(document)
    assert len(found["fleece_group_snapshots"].samples) == 3
    assert values(found["fleece_datastore_groups_left_out"]) == [7]


def test_the_textfile_appears_at_once_for_everybody_and_nothing_else_is_seen(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fleece.prom"
    seen: list[list[str]] = []
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        seen.append([one.name for one in tmp_path.iterdir()])
        assert self.stat().st_mode & 0o777 == 0o644
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_textfile(path, document)
    write_textfile(path, document)
    # node_exporter reads *.prom of the folder: the temporary one is none.
    assert [[name for name in names if name.endswith(".prom")] for names in seen] == [[], ["fleece.prom"]]
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["fleece.prom"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(text_string_to_metric_families(path.read_text()))


def test_a_textfile_that_cannot_be_written_leaves_the_old_one_and_no_rest(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "textfiles"
    folder.mkdir()
    path = folder / "fleece.prom"
    path.write_text("old")
    (tmp_path / "victim").write_text("precious")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            write_textfile(path, document)
    assert [one.name for one in folder.iterdir()] == ["fleece.prom"]
    assert path.read_text() == "old"
    # Whoever else may write into the folder leads it nowhere.
    path.unlink()
    path.symlink_to(tmp_path / "victim")
    write_textfile(path, document)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not path.is_symlink()


class Elements(HTMLParser):
    """Names and attributes of all elements; nesting is checked."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_hostile_names_as_text(document: dict[str, Any]) -> None:
    for guest in document["guests"]:
        guest["guest"] = guest["error"] = HOSTILE
        guest["reasons"] = [HOSTILE]
    document["host"] = document["version"] = HOSTILE
    for job in document["jobs"]:
        job["comment"] = job["job"] = job["schedule"] = HOSTILE
    for store in document["stores"]:
        store["repository"] = store["error"] = HOSTILE
    page = render_page(document)
    parsed = Elements()
    parsed.feed(page)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.found} <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "p", "main", "section", "div",
        "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "small", "span", "time", "progress", "br",
    }  # fmt: skip
    allowed = {"lang", "charset", "name", "content", "http-equiv", "rel", "href", "class", "scope", "datetime", "max",
               "value", "aria-label"}  # fmt: skip
    assert {name for _, attributes in parsed.found for name in attributes} <= allowed
    assert "<script>alert('1')</script>\\u202e\\u001b[2J" in parsed.text
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert [attributes["href"] for _, attributes in parsed.found if "href" in attributes] == ["data:,"]


def test_the_policy_allows_the_style_of_the_page_and_nothing_else(document: dict[str, Any]) -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", render_page(document), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in POLICY
    assert POLICY.startswith("default-src 'none';")
    assert "script" not in POLICY
    assert not re.search(r"style=|url\(|@import", render_page(document))


def test_the_page_has_what_an_administrator_looks_for(document: dict[str, Any]) -> None:
    parsed = Elements()
    parsed.feed(render_page(document))
    for text in ("things need attention", "drive: no bitmap", "100 B", "3 d", "in 15 h", "later", "95 % of 1000 B",
                 "1 damaged", "12.50", "last backup has failed", "the agent does not run"):  # fmt: skip
        assert text in parsed.text, text


def test_what_is_worst_is_seen_among_hundreds_of_guests_that_were_never_backed_up(document: dict[str, Any]) -> None:
    (guest, *_) = document["guests"]
    idle = {**guest, "state": "skipped", "time": None, "jobs": []}
    document["guests"] = [{**idle, "guest": f"guest-{number:03}"} for number in range(200)] + document["guests"]
    problems = find_problems(document)
    kinds = [kind for kind, _ in problems]
    assert kinds == sorted(kinds)  # bad, then warn
    parsed = Elements()
    parsed.feed(render_page(document))
    for text in ("1 snapshot is damaged", "last backup has failed", "the agent does not run", "more"):
        assert text in parsed.text, text


def test_a_healthy_host_says_so(tmp_path: Path) -> None:
    settings = config('default-repository = "main"\n[vm.web]\n[job.night]\ntype = "backup"\nvm = ["web"]\n')
    summary = Summary()
    summary.take(at(NOW - 60, backed_up(guest="web")))
    save_summary(JobStore(tmp_path, "night"), summary)
    import os

    write_document(agent_path(tmp_path), {"since": NOW - 100, "seen": NOW, "pid": os.getpid(), "version": "1"})
    document = overview(settings, tmp_path, NOW)
    assert find_problems(document) == []
    assert "Everything is as it should be." in render_page(document)


def test_texts_are_cut_and_odd_ones_shown() -> None:
    assert shown(None) == ""
    assert shown("<&>\"'") == "&lt;&amp;&gt;&quot;&#x27;"
    assert shown("\udcff") == "\\udcff"
    assert len(shown("x" * 10_000)) < 500
