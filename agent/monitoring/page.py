"""The status page: one HTML document, without scripts and without anything that is loaded from elsewhere.

Names, notes and errors come from guests, stores and other hosts: every text goes through `shown`.
"""

import base64
import hashlib
import html
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from agent.monitoring.summaries import GOOD, number
from core.units import format_duration, format_size

#: Seconds after which a browser asks again.
REFRESH_S: Final = 60
#: Characters of one text.
_MAX_TEXT: Final = 400
#: Rows of one table.
_MAX_ROWS: Final = 2000
#: Used part of a store from which on it is a problem.
_FULL: Final = 0.9

_STYLE: Final = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#5c6670;--line:#d8dee4;--row:#f5f7f9;--ok:#1a7f37;
--warn:#8a5a00;--bad:#b42318;--bar:#4a7fb5}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e4e8ec;--dim:#98a3ad;--line:#303840;--row:#1b2127;--ok:#57c26d;
--warn:#e0a93b;--bad:#ff7b6e;--bar:#6aa3dd}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:86rem;padding:1.2rem;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.35rem;margin:0}h2{font-size:1.05rem;margin:1.8rem 0 .4rem}
p{margin:.2rem 0}.dim,.none{color:var(--dim)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:600;white-space:nowrap}tbody tr:nth-child(even){background:var(--row)}
td,li,p{overflow-wrap:anywhere}td{min-width:5.5rem}td.n{min-width:0}td:nth-child(2){min-width:8rem}
time,th,td>span{white-space:nowrap}td.n{text-align:right;white-space:nowrap}th.n{text-align:right}td.w{white-space:nowrap}
small{color:var(--dim);display:block}
.ok,.warn,.bad{font-weight:600}.ok{color:var(--ok)}.warn{color:var(--warn)}.bad{color:var(--bad)}
ul.list{margin:.4rem 0 0;padding:0 0 0 1.1rem}
.sum{border:1px solid var(--line);border-left:.35rem solid var(--ok);padding:.6rem .9rem;margin:1rem 0;
border-radius:.3rem}
.sum.sbad{border-left-color:var(--bad)}.sum.swarn{border-left-color:var(--warn)}
progress{width:9rem;height:.7rem;accent-color:var(--bar)}
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
#: Nothing but this page's own style, and never inside another page.
POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def shown(value: Any, limit: int = _MAX_TEXT) -> str:
    """`value` as text of the page: escaped, and what controls terminals or the direction of text made visible."""
    text = "" if value is None else str(value)
    text = text if len(text) <= limit else f"{text[:limit]}..."
    visible = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    return html.escape(visible.encode("utf-8", "replace").decode(), quote=True)


def render_page(document: Mapping[str, Any]) -> str:
    """The page of what `agent.monitoring.overview` gives."""
    now = float(document["time"])
    host = shown(document["host"])
    problems = find_problems(document)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta http-equiv="refresh" content="{REFRESH_S}"><link rel="icon" href="data:,">',
        f"<title>Fleece: {host}</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>Backups of {host}</h1>",
        f'<p class="dim">Fleece {shown(document["version"])}, {_agent(document["agent"], now)}, '
        f"as of {_clock(now, seconds=True)}</p></header><main>",
        _summary(problems),
        _section("Guests", _guests(document["guests"], now)),
        _section("Repositories", _stores(document["stores"], now)),
        _section("Jobs", _jobs(document["jobs"], now)),
        _section("Notifications", _notifications(document["notifications"], now)) if document["notifications"] else "",
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def find_problems(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What somebody should look at: `bad` or `warn`, and a sentence; the worst first, what concerns all before guests.

    So the few things that explain the many are seen where many guests have something.
    """
    return sorted(_problems(document), key=lambda problem: problem[0] != "bad")


def _problems(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if not document["agent"]["running"]:
        yield "warn", "the agent does not run: no job is begun by itself, unless timers do it"
    if document["agent"]["refused"]:
        yield "bad", f"the agent goes on with an old configuration: {document['agent']['refused']}"
    for store in document["stores"]:
        yield from _store_problems(store)
    for job in document["jobs"]:
        state = (job["last-run"] or {}).get("state")
        if state in ("failed", "killed"):
            yield "bad", f"job {job['job']}: the last run {'has failed' if state == 'failed' else 'was killed'}"
    for target in document["notifications"]:
        if target["last-error"]:
            yield "warn", f"notification {target['name']}: {target['last-error']}"
    for guest in document["guests"]:
        name = guest["guest"]
        if guest["state"] == "failed":
            yield "bad", f"{name}: the last backup has failed"
        elif guest["state"] == "skipped" and guest["time"] is None:
            yield "warn", f"{name}: no backup yet, since it does not run"
        elif guest["state"] == "never":
            yield ("bad", f"{name}: no backup yet") if guest["jobs"] else ("warn", f"{name}: no job backs it up")
        elif guest["overdue"]:
            yield "bad", f"{name}: the last backup is {format_duration(guest['age-s'])} old"
        if guest["state"] in (*GOOD, "failed") and not guest["jobs"]:
            yield "warn", f"{name}: no job backs it up any more"


def _store_problems(store: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    name, status = store["repository"], store["status"] or {}
    if store["error"]:
        yield "bad", f"repository {name}: {store['error']}"
    damaged = number((status.get("verification") or {}).get("failed"))
    if damaged:
        yield "bad", f"repository {name}: {damaged} {'snapshots are' if damaged != 1 else 'snapshot is'} damaged"
    total, used = number(status.get("total")), number(status.get("used"))
    if total and used / total >= _FULL:
        yield "bad", f"repository {name}: {100 * used // total} % of the space is used"


def _summary(problems: Sequence[tuple[str, str]]) -> str:
    if not problems:
        return '<div class="sum"><p class="ok">Everything is as it should be.</p></div>'
    worst = "bad" if any(kind == "bad" for kind, _ in problems) else "warn"
    lines = "".join(f'<li class="{kind}">{shown(text)}</li>' for kind, text in problems[:50])
    more = f"<p>and {len(problems) - 50} more</p>" if len(problems) > 50 else ""
    heading = "One thing needs attention" if len(problems) == 1 else f"{len(problems)} things need attention"
    return f'<div class="sum s{worst}"><p>{heading}</p><ul class="list">{lines}</ul>{more}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], none: str) -> str:
    """A table; heads that begin with `#` are numbers. Cells are HTML."""
    if not rows:
        return f'<p class="none">{none}</p>'
    kinds = ["n" if head.startswith("#") else "" for head in heads]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{text.lstrip("#")}</th>' for text, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{_class(kind)}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows[:_MAX_ROWS]
    )
    more = f'<p class="dim">and {len(rows) - _MAX_ROWS} more</p>' if len(rows) > _MAX_ROWS else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _guests(guests: Sequence[Mapping[str, Any]], now: float) -> str:
    rows = []
    for guest in guests:
        place = shown("/".join(part for part in (guest["ns"], guest["group"]) if part))
        reasons = "".join(f"<li>{shown(reason)}</li>" for reason in guest["reasons"])
        full = f'<ul class="list">{reasons}</ul>' if reasons else ("none" if guest["time"] is not None else "")
        rows.append(
            (
                f"{shown(guest['guest'])}<small>{place}</small>",
                _guest_state(guest),
                _clock(guest["time"]),
                f'<span class="bad">{_age(guest["age-s"])}</span>' if guest["overdue"] else _age(guest["age-s"]),
                _size(guest["size"]),
                _size(guest["read"]),
                full,
                shown(guest["repository"]),
                _next(guest["next"], now) + (f"<small>{shown(guest['next-job'])}</small>" if guest["next-job"] else ""),
            )
        )
    heads = ("Guest", "State", "Last backup", "#Age", "#Size", "#Read", "Full reads", "Repository", "Next run")
    return _table(heads, rows, "No virtual machine is configured, and no job has backed up anything.")


def _guest_state(guest: Mapping[str, Any]) -> str:
    words = {"ok": ("ok", "ok"), "warnings": ("warn", "with warnings"), "failed": ("bad", "failed"),
             "skipped": ("none", "left out"), "never": ("bad" if guest["jobs"] else "warn", "never")}  # fmt: skip
    kind, text = words.get(str(guest["state"]), ("none", shown(guest["state"])))
    error = f"<small>{shown(guest['error'])}</small>" if guest["error"] else ""
    return f'<span class="{kind}">{text}</span>{error}'


def _jobs(jobs: Sequence[Mapping[str, Any]], now: float) -> str:
    kinds = {"ok": "ok", "warnings": "warn", "failed": "bad", "killed": "bad", "interrupted": "warn"}
    rows = []
    for job in jobs:
        last = job["last-run"] or {}
        state = str(last.get("state") or "never")
        words = f'<span class="{kinds.get(state, "none")}">{shown(state)}</span>'
        if job["running"]:
            words += '<small class="ok">runs now</small>'
        error = last.get("error")
        if isinstance(error, dict):
            words += f"<small>{shown(error.get('where'))}: {shown(error.get('why'))}</small>"
        elif last.get("warnings"):
            words += f"<small>{shown(last['warnings'][0])}</small>"
        took = last.get("duration-s")
        rows.append(
            (
                f"{shown(job['job'])}<small>{shown(job['comment'])}</small>",
                shown(job["type"]),
                words,
                _when(last.get("start"), now),
                shown(format_duration(took)) if isinstance(took, int | float) and took >= 0 else "",
                _when(job["last-success"], now),
                shown(job["repository"]),
                _next(job["next"], now) + f"<small>{shown(job['schedule'])}</small>",
            )
        )
    heads = ("Job", "Type", "Last run", "Begun", "#Took", "Last success", "Repository", "Next run")
    return _table(heads, rows, "The configuration has no jobs.")


def _stores(stores: Sequence[Mapping[str, Any]], now: float) -> str:
    rows = []
    for store in stores:
        status = store["status"] or {}
        bad = [text for kind, text in _store_problems(store) if kind == "bad"]
        prefix = f"repository {store['repository']}: "
        health = '<span class="ok">ok</span>' if status and not bad else '<span class="none">not looked at yet</span>'
        if bad:
            health = "".join(f'<span class="bad">{shown(text.removeprefix(prefix))}</span><br>' for text in bad)
        verification = status.get("verification") or {}
        checked = ", ".join(
            f"{number(verification.get(key))} {word}"
            for key, word in (("ok", "sound"), ("failed", "damaged"), ("none", "never"))
            if number(verification.get(key))
        )
        counts = status.get("counts") or {}
        snapshots = sum(number(one.get("snapshots")) for one in counts.values() if isinstance(one, dict))
        factor = status.get("deduplication-factor")
        rows.append(
            (
                shown(store["repository"]),
                health,
                _space(status),
                f"{snapshots}" if status else "",
                f"{factor:.2f}" if isinstance(factor, int | float) else "",
                shown(checked),
                _when(status.get("last-gc"), now) if status else "",
                _when(status.get("estimated-full-date"), now, ahead=True),
                _when(store["looked"], now),
            )
        )
    heads = ("Repository", "Health", "Space", "#Snapshots", "#Dedup", "Verified", "Last gc", "Full", "Looked at")
    return _table(heads, rows, "No repository is configured.")


def _space(status: Mapping[str, Any]) -> str:
    total, used, available = (number(status.get(name)) for name in ("total", "used", "avail"))
    if not status:
        return ""
    if not total:
        return f"{_size(used)} used"
    percent = int(100 * used // total)
    label = f"{percent} % used"
    bar = f'<progress max="100" value="{min(percent, 100)}" aria-label="{label}">{label}</progress>'
    return f"{bar}<small>{percent} % of {_size(total)}, {_size(available)} left</small>"


def _notifications(targets: Sequence[Mapping[str, Any]], now: float) -> str:
    rows = [
        (
            shown(one["name"]), shown(one["type"]), str(number(one["sent"])), str(number(one["failed"])),
            str(number(one["left-out"])), str(number(one["pending"])), _when(one["last-sent"], now),
            f'<span class="bad">{shown(one["last-error"])}</span>' if one["last-error"] else "",
        )
        for one in targets
    ]  # fmt: skip
    heads = ("Name", "Type", "#Sent", "#Failed", "#Left out", "#Waiting", "Last sent", "Last error")
    return _table(heads, rows, "")


def _agent(agent: Mapping[str, Any], now: float) -> str:
    if not agent["running"]:
        return '<span class="warn">the agent does not run</span>'
    since = agent["since"]
    return "agent up" + (f" for {shown(format_duration(max(0.0, now - since)))}" if since is not None else "")


def _size(value: Any) -> str:
    return "" if value is None else shown(format_size(number(value)))


def _age(seconds: Any) -> str:
    return "" if not isinstance(seconds, int | float) else shown(_span(max(0.0, float(seconds))))


def _span(seconds: float) -> str:
    for unit, word in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {word}"
    return f"{seconds:.0f} s"


def _when(moment: Any, now: float, *, ahead: bool = False) -> str:
    if not isinstance(moment, int | float) or isinstance(moment, bool):
        return ""
    distance = moment - now
    words = f"in {_span(distance)}" if distance > 0 else f"{_span(-distance)} ago"
    return f"{_clock(float(moment))}<small>{words}</small>" if ahead or distance <= 60 else _clock(float(moment))


def _next(moment: Any, now: float) -> str:
    return _when(moment, now, ahead=True)


def _clock(moment: Any, *, seconds: bool = False) -> str:
    """A time for people, in this host's zone; nothing if there is none."""
    if not isinstance(moment, int | float):
        return ""
    try:
        local = time.strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M", time.localtime(moment))
        exact = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    except (ValueError, OverflowError, OSError):
        return ""
    return f'<time datetime="{exact}">{local}</time>'
