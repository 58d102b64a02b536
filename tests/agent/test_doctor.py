import shutil
from pathlib import Path

import pytest

from agent import doctor
from agent.doctor import Check, State, check_datastore, examine, file_system_of
from agent.invocation import Invocation

from .conftest import Fleece


def states(checks: list[Check], name: str) -> list[State]:
    return [check.state for check in checks if check.name == name]


@pytest.fixture
def invocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invocation:
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FLEECE_RUN_DIR", str(tmp_path / "run"))
    (tmp_path / "fleece.toml").write_text(f'scratch = "{tmp_path}"\n')
    return Invocation(config_path=tmp_path / "fleece.toml")


def test_every_problem_has_words_and_a_fix(invocation: Invocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    checks = examine(invocation)
    for check in checks:
        assert check.detail
        assert check.fix or check.state in (State.OK, State.INFO), check
    assert states(checks, "qemu") == [State.INFO]
    assert states(checks, "qemu-nbd") == [State.WARNING]
    assert states(checks, "fuse") == [State.WARNING]


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [
        ("7.1.0", State.FAILED, "too old"),
        ("7.2.22 (Debian 1:7.2)", State.OK, "compatibility mode"),
        ("8.2.2", State.OK, "not for a VM with iothreads"),
        ("10.0.2", State.OK, "version 10.0"),
        ("what", State.WARNING, "does not tell its version"),
    ],
)
def test_qemu_is_judged_by_its_version(
    version: str, state: State, words: str, tmp_path: Path, invocation: Invocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (check,) = [check for check in examine(invocation) if check.name == "qemu"]
    assert (check.state, words in check.detail) == (state, True), check


def test_a_missing_datastore_is_a_failure_with_the_command_that_makes_it(tmp_path: Path) -> None:
    (check,) = check_datastore("main", tmp_path / "gone")
    assert check.state is State.FAILED
    assert check.fix == f"fleece datastore create {tmp_path / 'gone'}"


def test_a_datastore_that_pbs_may_share_is_pointed_out(store_folder: Path) -> None:
    assert {check.state for check in check_datastore("main", store_folder)} == {State.OK}
    (store_folder / ".gc-status").write_text("{}")
    assert any("does not see Fleece's locks" in check.detail for check in check_datastore("main", store_folder))


def test_a_datastore_on_a_network_file_system_is_a_warning(store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "file_system_of", lambda path: "nfs4")
    found = [check for check in check_datastore("main", store_folder) if check.state is State.WARNING]
    assert "nfs4" in found[0].detail


def test_looking_leaves_no_trace(store_folder: Path, invocation: Invocation, tmp_path: Path) -> None:
    before = sorted(path.name for path in store_folder.iterdir())
    list(check_datastore("main", store_folder))
    examine(invocation)
    assert sorted(path.name for path in store_folder.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleece.toml"]


def test_the_file_system_of_a_folder_has_a_name() -> None:
    assert file_system_of(Path("/proc")) == "proc"
    assert file_system_of(Path("/nowhere/at/all")) == ""


def test_a_wrong_configuration_is_one_failed_check(fleece: Fleece) -> None:
    (fleece.home / "fleece.toml").write_text("x = 1\n")
    answer = fleece("doctor", "--output", "json")
    assert answer.code == 1
    (check,) = [check for check in answer.document["checks"] if check["name"] == "configuration"]
    assert (check["state"], "fleece.toml:1" in check["detail"]) == ("failed", True)


def test_exit_code_follows_the_worst_check(fleece: Fleece, store_folder: Path) -> None:
    config = fleece.home / "fleece.toml"
    config.write_text(f'scratch = "{fleece.home}"\n[repository.main]\npath = "{store_folder}"\n')
    answer = fleece("doctor", "--output", "json")
    worst = {check["state"] for check in answer.document["checks"]}
    assert answer.code == (1 if "failed" in worst else 3 if "warning" in worst else 0)
    config.write_text(config.read_text() + '[vm.web]\nqmp = "/nowhere"\n')
    assert fleece("doctor").code in (1, 3)
    assert "-> start QEMU with -qmp unix:/nowhere" in fleece("doctor").out


def test_a_full_scratch_folder_is_a_warning(invocation: Invocation, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 30))
    assert states(examine(invocation), "scratch folder") == [State.WARNING]


def test_a_processor_that_numpy_does_not_run_on_is_found() -> None:
    old = "processor\t: 0\nflags\t\t: fpu sse2 ssse3 cx16\nbugs\t\t:\n"
    assert doctor.missing_instructions(old) == ["popcnt", "sse4_1", "sse4_2"]
    assert doctor.missing_instructions(old.replace("cx16", "cx16 popcnt sse4_1 sse4_2 avx")) == []
    assert doctor.missing_instructions("nothing that is known") == []
