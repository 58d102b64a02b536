"""The command line as a whole: help, exit codes, what goes to which stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Fleece


def test_help_teaches_by_example_and_lists_every_verb(fleece: Fleece) -> None:
    answer = fleece("--help")
    assert answer.code == 0
    for verb in ("vm", "backup", "list", "show", "restore", "ls", "find", "diff", "catalog", "mount", "forget",
                 "verify", "gc", "datastore", "doctor", "benchmark", "completion", "version"):  # fmt: skip
        assert f"\n  {verb} " in answer.out
    assert "fleece vm backup --qmp" in answer.out


VERBS = [
    "vm backup", "vm show", "vm cleanup", "backup", "list", "show", "restore", "mount", "forget", "verify", "gc",
    "prune", "protect", "unprotect", "notes", "owner", "namespace create", "namespace list", "namespace delete",
    "namespace move", "job list", "job run", "job history", "job log", "datastore status",
    "ls", "find", "diff", "catalog dump", "datastore create", "datastore list", "datastore remove", "doctor",
    "benchmark", "completion", "version",
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_the_general_options(verb: str, fleece: Fleece) -> None:
    answer = fleece(*verb.split(), "--help")
    assert answer.code == 0
    assert f"Examples:\n    fleece {verb}" in answer.out
    assert "--output" in answer.out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, agent.main\n"
        "assert agent.main.run(['--help']) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"numpy", "rich", "trio", "pydantic", "nbd", "pyfuse3", "qemu", "zstandard"} & set(done.stderr.split())


def test_help_is_quick() -> None:
    # Time of the processor, because a busy machine is not the command's fault.
    seconds = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "agent.main", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        ["lst"],
        ["list", "--nonsense"],
        ["show"],
        ["show", "vm/100"],
        ["list", "vm/100/x/y"],
        ["backup"],
        ["backup", "a.b.pxar:/etc"],
        ["backup", "root.pxar:/etc", "--include-dev", "/home", "--all-file-systems"],
        ["backup", "root.pxar:/etc", "--chunk-size", "100"],
        ["backup", "root.pxar:/etc", "--exclude", "[a"],
        ["forget"],
        ["forget", "vm/1/latest", "--group", "vm/1"],
        ["restore", "vm/1/latest"],
        ["datastore", "create", "name-without-slash"],
        ["completion", "tcsh"],
        ["list", "--ns", "a//b"],
        ["list", "--output", "yaml"],
    ],
)
def test_wrong_usage_ends_with_2_and_says_so_on_standard_error(arguments: list[str], stored: Fleece) -> None:
    answer = stored(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("Error: cannot ")
    if "yaml" not in arguments:
        answer = stored("--output", "json", *arguments)
        assert (answer.code, answer.out) == (2, "")
        assert answer.error["why"]


def test_no_repository_is_wrong_usage_with_a_hint(fleece: Fleece) -> None:
    answer = fleece("list", "--output", "json")
    assert answer.code == 2
    assert "FLEECE_REPOSITORY" in answer.error["hint"]


def test_a_failure_ends_with_1_and_one_json_error(stored: Fleece) -> None:
    answer = stored("show", "vm/100/latest", "--output", "json")
    assert (answer.code, answer.out) == (1, "")
    assert answer.error == {
        "what": "find the snapshot",
        "where": "vm/100/latest",
        "why": "the group has no finished snapshot",
        "hint": "'fleece list' shows what is there",
    }
    assert len(answer.err.splitlines()) == 1


def test_options_may_stand_before_and_behind_the_verb(stored: Fleece) -> None:
    assert stored("--output", "json", "list").document == []
    assert stored("list", "--output=json").document == []
    assert stored("list", "--output-format", "json-pretty").document == []


def test_repositories_are_taken_from_the_option_first_then_from_the_environment(
    fleece: Fleece, store_folder: Path
) -> None:
    fleece.environment = {"PBS_REPOSITORY": str(store_folder)}
    assert fleece.json("list") == []
    fleece.environment["FLEECE_REPOSITORY"] = "/nowhere/else"
    assert "/nowhere/else" in fleece("list").err
    assert fleece.json("list", "--repository", store_folder) == []


def test_the_configuration_names_repository_and_namespace(fleece: Fleece, store_folder: Path) -> None:
    config = fleece.home / "fleece.toml"
    config.write_text(f'default-repository = "main"\n[repository.main]\npath = "{store_folder}"\n')
    assert fleece.json("list") == []
    config.write_text(config.read_text() + 'ns = "a/b"\n')
    assert "a/b" in fleece("list").err
    assert fleece.json("list", "--ns", "") == []


def test_a_wrong_configuration_names_file_and_line(fleece: Fleece) -> None:
    config = fleece.home / "fleece.toml"
    config.write_text("\n\n[vm.web]\nqpm = 3\n")
    answer = fleece("list", "--output", "json")
    assert answer.code == 2
    assert answer.error["where"] == f"{config}:4"
    assert fleece("list", "--config", "/nowhere/fleece.toml").code == 2


def test_a_reader_that_goes_away_is_no_error_to_read_about(stored: Fleece) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "agent.main", "completion", "bash"], stdout=write, stderr=subprocess.PIPE, timeout=60,
        check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def _with_streams(stored: Fleece, redirection: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command by a shell that opens or closes its streams."""
    script = f'exec "$@" {redirection}'
    return subprocess.run(
        ["/bin/sh", "-c", script, "sh", sys.executable, "-m", "agent.main", *arguments],
        env={**os.environ, "FLEECE_CONFIG": str(stored.home / "fleece.toml"), "FLEECE_REPOSITORY": str(stored.repo)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["list"], ["list", "--output", "json"], ["--help"], ["gc", "--dry-run"]])
@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_output_or_error_takes_everything(
    redirection: str, arguments: list[str], stored: Fleece
) -> None:
    done = _with_streams(stored, redirection, *arguments)
    assert (done.returncode, done.stdout) == (0, "")
    assert "rror" not in done.stderr


def test_what_is_restored_to_a_closed_standard_output_is_an_error(stored: Fleece) -> None:
    conf = stored.home / "x.conf"
    conf.write_text("x")
    stored.json("backup", f"x.conf:{conf}", "--backup-id", "web")
    done = _with_streams(stored, ">&-", "restore", "host/web/latest", "x.conf", "-")
    assert (done.returncode, done.stderr) == (1, "Error: cannot write to standard output: it is closed\n")


@pytest.mark.parametrize(
    "arguments", [["datastore", "status"], ["datastore", "status", "--output", "json"], ["version"], ["--help"]]
)
def test_a_full_standard_output_is_an_error(arguments: list[str], stored: Fleece) -> None:
    done = _with_streams(stored, ">/dev/full", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "standard output" in line
    assert "No space left on device" in line


def test_an_unexpected_exception_is_one_line_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agent import doctor, main

    def broken(invocation: object) -> list[object]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(doctor, "examine", broken)
    assert main.run(["doctor", "--output", "json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err)["error"]
    assert error["why"] == "something unexpected happened (ZeroDivisionError: division by zero)"
    assert "--debug" in error["hint"]
    assert main.run(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str, fleece: Fleece) -> None:
    answer = fleece("completion", shell)
    assert answer.code == 0
    assert "_FLEECE_COMPLETE=complete_" + shell in answer.out


def test_the_shell_is_given_verbs_and_options(fleece: Fleece) -> None:
    fleece.environment = {"_FLEECE_COMPLETE": "complete_bash", "COMP_WORDS": "fleece da", "COMP_CWORD": "1"}
    assert fleece().out.split() == ["datastore"]
    fleece.environment = {"_FLEECE_COMPLETE": "complete_bash", "COMP_WORDS": "fleece list --rec", "COMP_CWORD": "2"}
    assert fleece().out.split() == ["--recursive"]


def test_version_names_itself_and_its_parts(fleece: Fleece) -> None:
    document = fleece.json("version")
    assert fleece("version").out == f"fleece {document['version']}\n"
    assert "trio" in document["components"]


def test_benchmark_has_a_rate_for_each_primitive_and_tells_what_serves(fleece: Fleece) -> None:
    document = fleece.json("benchmark", "--runs", "1")
    assert all(figure["mb-per-s"] > 0 for figure in document["primitives"])
    assert any(figure["used"] and document["sha256"] in figure["name"] for figure in document["primitives"])
