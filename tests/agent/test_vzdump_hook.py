"""`fleece vzdump-hook`: every phase as vzdump calls it, with nothing in the environment but vzdump's variables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from agent.config import parse_config
from agent.vzdump_hook import GUEST_PHASES, JOB_PHASES, Doing, VzdumpCall, archive_of, group_of, handle
from core.errors import FleeceError, NotFoundError, UsageError
from hypervisor.unix_socket import process_start_time
from tests.support.waiting import until

from .conftest import Fleece


class Done:
    """Writes down what would be done; what is in `failing` fails."""

    def __init__(self, *failing: str) -> None:
        self.did: list[str] = []
        self.said: list[str] = []
        self._failing = failing

    def _do(self, what: str) -> None:
        self.did.append(what)
        if what in self._failing:
            raise FleeceError("do", what, "it cannot be done")

    def __call__(self, call: VzdumpCall, text: str) -> bool:
        doing = Doing(
            lambda path, call: self._do(f"{path.name} {' '.join(call.arguments)}"),
            lambda name: self._do(f"job {name}"),
            lambda call, path: self._do(f"store {path.name}"),
        )
        return handle(call, parse_config(text, "f"), doing, self.said.append)


CONFIG = """
[vzdump-hook]
store = true
scripts = ["/a/one", "/a/two"]
[vzdump-hook.jobs]
job-end = ["offsite"]
backup-end = ["check"]
[job.offsite]
type = "gc"
[job.check]
type = "verify"
"""


@pytest.mark.parametrize("phase", JOB_PHASES)
def test_phases_of_the_job_have_no_arguments(phase: str) -> None:
    done = Done()
    assert done(VzdumpCall.parse([phase], {}), CONFIG)
    assert done.did == [f"one {phase}", f"two {phase}", *(["job offsite"] if phase == "job-end" else [])]
    with pytest.raises(UsageError, match="it has no arguments"):
        VzdumpCall.parse([phase, "snapshot", "100"], {})


@pytest.mark.parametrize("phase", GUEST_PHASES)
def test_phases_of_a_guest_have_its_mode_and_number(phase: str, tmp_path: Path) -> None:
    (tmp_path / "dump.vma").touch()
    call = VzdumpCall.parse([phase, "snapshot", "100"], {"TARGET": str(tmp_path / "dump.vma"), "PATH": "/bin"})
    assert call.variables == {"TARGET": str(tmp_path / "dump.vma")}
    done = Done()
    assert done(call, CONFIG)
    more = ["store dump.vma", "job check"] if phase == "backup-end" else []
    assert done.did == [f"one {phase} snapshot 100", f"two {phase} snapshot 100", *more]
    for wrong in (
        [phase],
        [phase, "snapshot"],
        [phase, "live", "100"],
        [phase, "stop", "1x"],
        [phase, "stop", "1", "2"],
    ):
        with pytest.raises(UsageError, match="MODE"):
            VzdumpCall.parse(wrong, {})


def test_a_phase_that_vzdump_does_not_have_is_refused() -> None:
    for wrong in ([], ["backup"], [""]):
        with pytest.raises(UsageError):
            VzdumpCall.parse(wrong, {})
    with pytest.raises(UsageError, match="vzdump has job-init"):
        parse_config('[vzdump-hook.jobs]\nbackup = ["x"]\n', "f")


def test_what_fails_stops_nothing_and_counts_where_vzdump_heeds_it(tmp_path: Path) -> None:
    call = VzdumpCall.parse(["backup-end", "stop", "100"], {"TARGET": "pbs:backup/vm/100"})
    done = Done("one backup-end stop 100")
    assert not done(call, CONFIG)
    assert done.did[1:] == ["two backup-end stop 100", "job check"]
    assert done.said[0] == "script /a/one: cannot do one backup-end stop 100: it cannot be done"
    assert "TARGET is 'pbs:backup/vm/100', no path" in done.said[1]
    assert done(call, CONFIG.replace("store", "required = false\nstore"))
    for phase in ("backup-abort", "log-end"):
        assert Done(f"one {phase} stop 100")(VzdumpCall.parse([phase, "stop", "100"], {}), CONFIG)
    assert Done("one job-abort")(VzdumpCall.parse(["job-abort"], {}), CONFIG)


def test_a_signal_ends_the_script_that_runs_and_nothing_more_is_begun(tmp_path: Path) -> None:
    for name, text in (("one", f"echo $$ >{tmp_path}/pid; exec sleep 1000"), ("two", f"touch {tmp_path}/begun")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    config = tmp_path / "hook.toml"
    config.write_text(f'[vzdump-hook]\nscripts = ["{tmp_path}/one", "{tmp_path}/two"]\n')
    line = [str(Path(sys.executable).with_name("fleece")), "vzdump-hook", "job-start", "--config", str(config)]
    running = subprocess.Popen(line, stderr=subprocess.PIPE)
    trio.run(until, lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    running.terminate()
    assert b"SIGTERM received" in running.communicate(timeout=60)[1]
    assert running.returncode == 1
    assert process_start_time(int((tmp_path / "pid").read_text())) is None
    assert not (tmp_path / "begun").exists()


def test_only_a_file_is_an_archive_and_its_group_is_beside_those_of_the_guest(tmp_path: Path) -> None:
    call = VzdumpCall("backup-end", "stop", "100", {"VMTYPE": "lxc"})
    assert group_of(call) == "ct/vzdump-100"
    with pytest.raises(NotFoundError):
        archive_of(call)
    for target, why in ((tmp_path, "no regular file"), (tmp_path / "gone", "No such file")):
        with pytest.raises(FleeceError, match=why):
            archive_of(VzdumpCall("backup-end", "stop", "100", {"TARGET": str(target)}))


def call_it(fleece: Fleece, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """As vzdump does, but for where this test has its files."""
    own = {"FLEECE_CONFIG", "FLEECE_STATE_DIR", "FLEECE_RUN_DIR"}
    environment = {key: value for key, value in fleece._environment().items() if key in own}
    code = "from agent.cli_vzdump_hook import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=environment | variables, capture_output=True, text=True, check=False, timeout=120, cwd="/",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_archive_of_vzdump_is_stored_and_comes_back_with_what_lies_beside_it(
    fleece: Fleece, store_folder: Path, tmp_path: Path
) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    archive = dump / "vzdump-qemu-100-2026_01_02-03_04_05.vma"
    archive.write_bytes(os.urandom(100_000))
    (dump / f"{archive.name}.notes").write_text("web")
    (dump / "vzdump-qemu-101-2026_01_02-03_04_05.vma").write_text("another's")
    (fleece.home / "fleece.toml").write_text(
        f'default-repository = "main"\n[repository.main]\npath = "{store_folder}"\n[vzdump-hook]\nstore = true\n'
    )
    done = call_it(fleece, "backup-end", "snapshot", "100", TARGET=str(archive), VMTYPE="qemu", HOSTNAME="web")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "is stored as vm/vzdump-100/" in done.stderr
    back = tmp_path / "back"
    answer = fleece("restore", "vm/vzdump-100/latest", "vzdump.pxar", back, "--repo", "main")
    assert answer.code == 0, answer.err
    # The patterns that chose the files are kept in the archive, as PBS's client does it.
    names = {path.name for path in back.iterdir()} - {".pxarexclude-cli"}
    assert names == {archive.name, f"{archive.name}.notes"}
    assert (back / archive.name).read_bytes() == archive.read_bytes()
    failed = call_it(fleece, "backup-end", "snapshot", "100", TARGET=str(dump / "gone"), VMTYPE="qemu")
    assert failed.returncode == 1
    assert call_it(fleece, "no-such-phase").returncode == 2
