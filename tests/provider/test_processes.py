"""What the plugin makes of a `fleece` that does not do as it should: it hangs, prints garbage, or ends."""

import json
import os
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.provider.plugin import PERL, Died, Worker
from tests.support.cache import ROOT
from tests.support.waiting import until

VOLNAME: Final = "backup/vm/100/2026-01-02T03:04:05Z"
#: Answers `backup-init` as a session does, then does what stands behind it.
_ID: Final = r"""read -r line; id=$(printf '%s' "$line" | sed 's/^{"call":"[^"]*","id":"\([^"]*\)".*/\1/')"""
BEGUN: Final = f"""
{_ID}
printf '{{"id": "%s", "result": {{"archive-name": "vm/100/2026-01-02T03:04:05Z"}}}}\\n' "$id"
{_ID}
"""


def played(worker: Worker, script: str, **limits: float) -> Worker:
    """A worker whose `fleece` is a shell script."""
    worker.command = ("/bin/sh", "-c", script)
    worker.limits = {"CALL_LIMIT_S": 30, "TERM_LIMIT_S": 1, "END_LIMIT_S": 5, **limits}
    return worker


@pytest.mark.parametrize("module", ["Storage/Custom/FleecePlugin", "BackupProvider/Plugin/Fleece", "Fleece/Process"])
async def test_the_perl_is_valid_without_warnings(module: str) -> None:
    import trio

    include = [f"-I{ROOT / 'proxmox'}", f"-I{PERL}"]
    checked = ["/usr/bin/perl", "-T", "-w", "-c", *include, str(ROOT / f"proxmox/PVE/{module}.pm")]
    done = await trio.run_process(checked, capture_stderr=True)
    assert done.stderr.decode().strip().endswith("syntax OK")
    assert done.stderr.count(b"\n") == 1, done.stderr


async def test_all_methods_of_the_base_class_are_there(worker: Worker) -> None:
    base = (PERL / "PVE/BackupProvider/Plugin/Base.pm").read_text()
    names = base.partition("qw(")[2].partition(")")[0].split()
    assert len(names) == 21
    source = (ROOT / "proxmox/PVE/BackupProvider/Plugin/Fleece.pm").read_text()
    assert [name for name in names if f"sub {name} {{" not in source] == []


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("cat > /dev/null; echo no JSON at all", "its answer is no JSON"),
        ("cat > /dev/null; echo '[1, 2'", "its answer is no JSON"),
        ("cat > /dev/null; echo '\"text\"'", "its answer is no JSON"),
        ("cat > /dev/null; echo '{}'", "no number 'total'"),
        ("""cat > /dev/null; echo '{"total": -1, "available": 1, "used": 1}'""", "no number 'total'"),
        ("""cat > /dev/null; echo '{"total": [], "available": 1, "used": 1}'""", "no number 'total'"),
        ("cat > /dev/null; echo 'went wrong' >&2; exit 7", "it ended with 7: went wrong"),
        ("cat > /dev/null; kill -9 $$", "ended by signal 9"),
        (
            """cat > /dev/null; echo '{"error": {"what": "open", "where": "main", "why": "gone", "hint": "look"}}' >&2
            exit 1""",
            "^cannot open main: gone; look\n$",
        ),
        ("exec true", "its answer is no JSON"),
    ],
)
async def test_an_answer_that_is_none(worker: Worker, script: str, match: str) -> None:
    async with played(worker, script).started() as plugin:
        with pytest.raises(Died, match=match):
            await plugin.storage("status", "fleece", "@scfg", {})
        assert plugin.children() == []
        # The status daemon asks again and again: a failure is not looked into each time.
        with pytest.raises(Died, match=match):
            await plugin.storage("status", "fleece", "@scfg", {})


async def test_a_program_that_is_not_there(worker: Worker) -> None:
    worker.command = ("/not/there",)
    async with worker.started() as plugin:
        with pytest.raises(Died, match="cannot run /not/there: No such file"):
            await plugin("job_init", 1)


async def test_a_question_that_hangs_is_ended_with_all_it_has_started(worker: Worker, tmp_path: Path) -> None:
    left = tmp_path / "pid"
    script = f"trap '' TERM; (trap '' TERM; echo $$ > {left}; sleep 1000) & wait; sleep 1000"
    async with played(worker, script, CALL_LIMIT_S=1).started() as plugin:
        with pytest.raises(Died, match="job-init: no answer in 1 seconds"):
            await plugin("job_init", 1)
        assert plugin.children() == []
        # On a busy machine it may have come to an end before it came that far.
        await until(lambda: not left.exists() or not Path(f"/proc/{left.read_text().strip()}").exists())


async def test_an_answer_without_end_is_cut(worker: Worker) -> None:
    async with played(worker, "cat > /dev/null; exec cat /dev/zero", MAX_ANSWER=1 << 20).started() as plugin:
        with pytest.raises(Died, match="its answer is too long"):
            await plugin("job_init", 1)
        assert plugin.children() == []


@pytest.mark.parametrize(
    ("rest", "match"),
    [
        ("echo garbage; sleep 1000", "what it says is no JSON"),
        ("echo '[]'; sleep 1000", "what it says is no JSON"),
        ("""echo '{"id": "other", "result": {}}'; sleep 1000""", "answers what was not asked"),
        ("""printf '{"id": "%s"}\\n' "$id"; sleep 1000""", "no result"),
        (
            """printf '{"id": "%s", "result": {"volumes": {"d": "all"}}}\\n' "$id"; read -r line; exit 1""",
            "no usable 'd'",
        ),
        ("""printf '{"id": "%s", "error": 1}\\n' "$id"; read -r line; exit 1""", "does not say why"),
        ("echo 'lost the repository' >&2; exit 1", "it ended with 1: lost the repository"),
        ("exit 0", "it ended with 0"),
        ("sleep 1000", "no sign of life for 3 seconds"),
        ("exec 1>&-; sleep 1000", "it does not answer any more"),
    ],
)
async def test_a_session_that_does_not_answer(worker: Worker, rest: str, match: str) -> None:
    hangs = match.startswith("no sign of life")
    async with played(worker, BEGUN + rest, SILENCE_LIMIT_S=3 if hangs else 60).started() as plugin:
        assert await plugin("backup_init", 100, "qemu", 1) == {"archive-name": "vm/100/2026-01-02T03:04:05Z"}
        with pytest.raises(Died, match=match):
            await plugin("backup_vm_query_incremental", 100, {"d": {"size": 512}})
        with pytest.raises(Died):
            await plugin("backup_cleanup", 100, "qemu", 1, {})
        assert plugin.children() == []
        assert await plugin("backup_cleanup", 100, "qemu", 0, {"error": "no"}) == {"stats": {}}
        assert await plugin("backup_handle_log_file", 100, "/var/log/x") is None


async def test_signs_of_life_and_log_lines(worker: Worker) -> None:
    lines = [
        {"alive": True},
        {"log": {"level": "warn", "message": "zeile\u001b[31m\nzwei ü"}},
        {"log": {"level": "strange", "message": "three"}},
        {"log": {"level": "info", "message": ["no text"]}},
    ]
    said = "".join(f"printf '%s\\n' '{json.dumps(line)}'\n" for line in lines)
    answer = """printf '{"id": "%s", "result": {"volumes": {}}}\\n' "$id"; cat > /dev/null"""
    async with played(worker, BEGUN + said + answer, SILENCE_LIMIT_S=30).started() as plugin:
        await plugin("backup_init", 100, "qemu", 1)
        assert await plugin("backup_vm_query_incremental", 100, {"d": {"size": 512}}) == {}
        assert [level for level, _ in plugin.log] == ["warn", "info"]
        assert plugin.log[0][1].encode("latin-1").decode() == "zeile [31m zwei ü"
        await plugin("job_cleanup")
        assert plugin.children() == []


async def test_an_impossible_archive_name_is_refused(worker: Worker) -> None:
    script = BEGUN.replace("vm/100/2026-01-02T03:04:05Z", "../../etc/passwd")
    async with played(worker, script).started() as plugin:
        with pytest.raises(Died, match="no usable 'archive-name'"):
            await plugin("backup_init", 100, "qemu", 1)
        assert plugin.children() == []


async def test_a_worker_that_is_told_to_stop_ends_the_session(worker: Worker, tmp_path: Path) -> None:
    told = tmp_path / "told"
    script = f"{BEGUN} trap 'touch {told}; exit 0' TERM; touch {tmp_path / 'asked'}; sleep 1000 & wait"
    async with played(worker, script, SILENCE_LIMIT_S=60).started() as plugin:
        await plugin("backup_init", 100, "qemu", 1)
        message = {"on": "provider", "call": "backup_vm_query_incremental", "args": [100, {"d": {"size": 512}}]}
        await plugin.send(message)
        await until((tmp_path / "asked").exists)
        os.kill(plugin.process.pid, signal.SIGTERM)
        with pytest.raises(Died, match="interrupted by signal"):
            await plugin.answer()
        assert await plugin("backup_cleanup", 100, "qemu", 0, {"error": "interrupted"}) == {"stats": {}}
        assert told.exists()
        assert plugin.children() == []


async def test_a_log_that_cannot_be_kept_does_not_end_the_job(worker: Worker, tmp_path: Path) -> None:
    """To vzdump a failure of that call is one of the whole job: guests whose turn has not come would have no backup."""
    asked, hangs = tmp_path / "asked", tmp_path / "hangs"
    fails = f"test -e {hangs} && {{ touch {asked}; exec sleep 1000; }}; echo 'no space' >&2; exit 1"
    done = """printf '{"id": "%s", "result": {"archive-size": 5}}\\n' "$id"; cat > /dev/null"""
    script = f"case $1 in call) cat > /dev/null; {fails};; esac\n{BEGUN}{done}"
    async with played(worker, script).started() as plugin:
        await plugin("backup_init", 100, "qemu", 1)
        assert await plugin("backup_cleanup", 100, "qemu", 1, {}) == {"stats": {"archive-size": 5}}
        assert await plugin("backup_handle_log_file", 100, "/var/log/x") is None
        ((level, text),) = plugin.log
        assert level == "warn"
        assert text.startswith("the log of vm/100/2026-01-02T03:04:05Z cannot be kept: fleece provider call handle-log")
        assert text.endswith("it ended with 1: no space")
        # Whoever stops the job stops it here, too.
        hangs.touch()
        await plugin.send({"on": "provider", "call": "backup_handle_log_file", "args": [100, "/var/log/x"]})
        await until(asked.exists)
        os.kill(plugin.process.pid, signal.SIGTERM)
        with pytest.raises(Died, match=r"^interrupted by signal$"):
            await plugin.answer()
        assert plugin.children() == []


async def test_how_it_ended_need_not_be_known(worker: Worker) -> None:
    worker.reaped = True
    good = """cat > /dev/null; echo '{"total": 3, "available": 2, "used": 1}'"""
    async with played(worker, good).started() as plugin:
        assert await plugin.storage("status", "fleece", "@scfg", {}) == [3, 2, 1, 1]
    async with played(worker, "cat > /dev/null; echo 'no such thing' >&2; exit 1").started() as plugin:
        with pytest.raises(Died, match="it has ended: no such thing"):
            await plugin.storage("status", "fleece", "@scfg", {})
    async with played(worker, BEGUN + "exit 1").started() as plugin:
        await plugin("backup_init", 100, "qemu", 1)
        with pytest.raises(Died, match="fleece provider session: it has ended"):
            await plugin("backup_vm_query_incremental", 100, {"d": {"size": 512}})
        assert plugin.children() == []
