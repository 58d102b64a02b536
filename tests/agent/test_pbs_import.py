"""What a PBS host has is made known here; its files are in its own form."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.main import run
from agent.pbs_config import read_datastores, read_endpoints
from agent.places import datastores_file, s3_endpoints_file, secrets_dir
from agent.registry import Registry, S3Place
from agent.s3_endpoints import EndpointRegistry
from core.errors import FleeceError, NotFoundError
from datastore.files import Owner
from datastore.s3.counter_file import CounterFile
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import ACCESS_KEY, BUCKET, REGION, SECRET

S3_CFG = """s3-endpoint: aws-main
\tendpoint {{bucket}}.s3.{{region}}.amazonaws.com
\tregion eu-central-1
\taccess-key AKIA123
\tsecret-key very/secret
\tput-rate-limit 20
\trate-in 10 MiB
\tprovider-quirks skip-if-none-match-header
\tsomething-new 1

s3-endpoint: broken
\tendpoint https://no/host
\taccess-key A
\tsecret-key B

s3-endpoint: bare
\tendpoint host.example.org
\taccess-key A
"""
DATASTORE_CFG = """datastore: main
\tcomment with: colons = and commas, too
\tpath /backup/main
\ttuning chunk-order=inode,sync-level=file
\tgc-schedule daily

datastore: cloud
\tpath /mnt/cache/cloud
\tbackend bucket=pbs-backups,client=aws-main,max-cache-size=64G,type=s3
\tnotification-thresholds s3-get=5

datastore: usb
\tbacking-device 1234
\tpath backup

datastore: odd
\tpath /x
\tbackend type=s3,client=aws-main,bucket=NOT/A/BUCKET
"""


@pytest.fixture
def pbs(tmp_path: Path) -> Path:
    folder = tmp_path / "proxmox-backup"
    folder.mkdir()
    (folder / "s3.cfg").write_text(S3_CFG)
    (folder / "s3.cfg").chmod(0o640)
    (folder / "datastore.cfg").write_text(DATASTORE_CFG)
    return folder


def test_endpoints_are_read_with_all_that_fleece_knows(pbs: Path) -> None:
    good, broken, bare = read_endpoints(pbs)
    assert good.section is not None
    assert (good.id, good.secret, good.ignored) == ("aws-main", "very/secret", ["something-new"])
    found = good.section.resolve(good.id, good.secret)
    assert (found.region, found.put_rate_limit, found.rate_in) == ("eu-central-1", 20.0, 10 << 20)
    assert "very/secret" not in repr(good)
    assert broken.section is None
    assert "no host name" in broken.why
    assert bare.section is None
    assert "empty" in bare.why


def test_datastores_are_read_and_those_that_cannot_be_say_why(pbs: Path) -> None:
    main, cloud, usb, odd = read_datastores(pbs)
    assert (main.path, main.sync_level, main.client) == (Path("/backup/main"), "file", None)
    assert (cloud.client, cloud.bucket, cloud.max_cache_size) == ("aws-main", "pbs-backups", 64 << 30)
    assert (cloud.thresholds, cloud.reset_schedule, cloud.ignored) == ({"s3-get": 5}, None, [])
    assert usb.path is None
    assert "removable" in usb.why
    assert odd.path is None
    assert "3 to 63" in odd.why


@pytest.mark.parametrize(
    ("options", "thresholds", "schedule", "ignored"),
    [
        (
            "notification-thresholds s3-get=1000, s3-upload=10GiB,s3-delete=7\n\tcounter-reset-schedule monthly",
            {"s3-get": 1000, "s3-upload": 10 << 30, "s3-delete": 7},
            "monthly",
            [],
        ),
        ("counter-reset-schedule mon..fri 02:00", {}, "mon..fri 02:00", []),
        ("counter-reset-schedule whenever", {}, None, ["counter-reset-schedule"]),
        ("notification-thresholds s3-get=many", {}, None, ["notification-thresholds"]),
        ("notification-thresholds s3-get=1,hard-limit,requests=2", {}, None, ["notification-thresholds"]),
    ],
)
def test_thresholds_and_schedules_of_counters_are_read(
    pbs: Path, options: str, thresholds: dict[str, int], schedule: str | None, ignored: list[str]
) -> None:
    backend = "backend type=s3,client=aws-main,bucket=bucket"
    (pbs / "datastore.cfg").write_text(f"datastore: cloud\n\tpath /c\n\t{backend}\n\t{options}\n")
    (cloud,) = read_datastores(pbs)
    assert (cloud.thresholds, cloud.reset_schedule, cloud.ignored) == (thresholds, schedule, ignored)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o666])
def test_secrets_that_others_may_read_or_change_are_refused(pbs: Path, mode: int) -> None:
    (pbs / "s3.cfg").chmod(mode)
    with pytest.raises(FleeceError, match=f"{mode:04o}"):
        read_endpoints(pbs)


@pytest.mark.parametrize(
    "text",
    ["", "\0", "\tpath /x\n", "datastore:\n\tpath /x\n", "datastore: x\n", "datastore: a/b\n\tpath /x\n", "=" * 999],
)
def test_a_damaged_file_gives_nothing_that_can_be_used(pbs: Path, text: str) -> None:
    (pbs / "datastore.cfg").write_text(text)
    assert all(store.path is None for store in read_datastores(pbs))


def test_a_line_of_many_blanks_is_read_at_once(pbs: Path) -> None:
    """Searched in the wrong way it takes the square of its length: hours."""
    (pbs / "datastore.cfg").write_text("datastore: main\n\tpath /a\n\tcomment x" + " " * 2_000_000 + "y\n")
    assert [one.name for one in read_datastores(pbs)] == ["main"]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(pbs: Path) -> None:
    (pbs / "datastore.cfg").unlink()
    os.mkfifo(pbs / "datastore.cfg")
    with pytest.raises(FleeceError, match="it is no file"):
        read_datastores(pbs)


def test_without_endpoints_there_are_none_and_without_datastores_it_is_an_error(pbs: Path) -> None:
    (pbs / "s3.cfg").unlink()
    assert read_endpoints(pbs) == []
    (pbs / "datastore.cfg").unlink()
    with pytest.raises(NotFoundError, match="name the folder"):
        read_datastores(pbs)


# The command

Imported = Callable[..., tuple[int, dict[str, dict[str, str]], str]]


@pytest.fixture
def imported(pbs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Imported:
    """`fleece datastore import`: exit code, steps by name, standard error."""
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FLEECE_CONFIG", str(tmp_path / "fleece.toml"))
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    (tmp_path / "fleece.toml").touch()

    def call(*arguments: str | Path) -> tuple[int, dict[str, dict[str, str]], str]:
        capfd.readouterr()
        code = run(["datastore", "import", str(pbs), *map(str, arguments), "--output", "json"])
        out, err = capfd.readouterr()
        assert "very/secret" not in out + err
        assert SECRET not in out + err
        steps = {step["name"]: step for step in json.loads(out)["steps"]} if out else {}
        return int(code), steps, err

    return call


def test_a_dry_run_says_what_would_be_done_and_does_nothing(imported: Imported, tmp_path: Path) -> None:
    code, steps, _ = imported("--dry-run")
    assert code == 0
    actions = {name: step["action"] for name, step in steps.items()}
    assert actions == {
        "aws-main": "add", "broken": "left-out", "bare": "left-out",
        "main": "register", "cloud": "left-out", "usb": "left-out", "odd": "left-out",
    }  # fmt: skip
    assert "fleece datastore create cloud --s3 aws-main --bucket pbs-backups" in steps["cloud"]["why"]
    assert imported("--dry-run", "--cache", tmp_path / "caches")[1]["cloud"]["action"] == "take-over"
    assert not (tmp_path / "state").exists()
    assert imported("--store", "another")[0] == 1


def test_endpoints_and_folders_are_registered_and_again_is_fine(
    imported: Imported, pbs: Path, store_folder: Path
) -> None:
    (pbs / "datastore.cfg").write_text(DATASTORE_CFG.replace("/backup/main", str(store_folder)))
    code, steps, err = imported("--store", "main", "--store", "cloud")
    assert (code, set(steps)) == (3, {"aws-main", "main", "cloud"})
    assert "datastore cloud was left out" in err
    found = Registry(datastores_file()).datastores()
    assert (found["main"].path, found["main"].sync_level, set(found)) == (store_folder, "file", {"main"})
    endpoint = EndpointRegistry(s3_endpoints_file(), secrets_dir()).endpoint("aws-main")
    assert (endpoint.secret, endpoint.access_key) == ("very/secret", "AKIA123")
    assert "very/secret" not in s3_endpoints_file().read_text()
    code, steps, _ = imported("--store", "main")
    assert (code, steps["main"]["action"]) == (0, "present")


def test_a_folder_that_is_no_datastore_fails_and_the_rest_is_done(imported: Imported) -> None:
    code, steps, err = imported()
    assert code == 1
    assert steps["main"]["action"] == "failed"
    assert steps["aws-main"]["action"] == "add"
    assert json.loads(err.splitlines()[-1])["error"]["where"] == "main"


def test_a_bucket_of_pbs_is_taken_over_only_on_demand(
    imported: Imported, pbs: Path, tmpfs: Path, s3_emulator: S3Emulator
) -> None:
    (pbs / "s3.cfg").write_text(
        f"s3-endpoint: gate\n\tendpoint 127.0.0.1\n\tport {s3_emulator.port}\n\tregion {REGION}\n"
        f"\taccess-key {ACCESS_KEY}\n\tsecret-key {SECRET}\n\tpath-style true\n"
    )
    (pbs / "datastore.cfg").write_text(
        f"datastore: cloud\n\tpath /mnt/cache/cloud\n\tbackend bucket={BUCKET},client=gate,type=s3\n"
        "\tnotification-thresholds s3-put=9,s3-download=1GiB\n\tcounter-reset-schedule weekly\n"
    )
    s3_emulator.bucket.put("cloud/.in-use", b'{"hostname":"pbs7"}')
    s3_emulator.bucket.put("cloud/.cnt/vm/100/owner", b"root@pam\n")
    # PBS talks https only, so a person says that this one does not.
    endpoints = EndpointRegistry(s3_endpoints_file(), secrets_dir())
    (gate,) = read_endpoints(pbs)
    assert gate.section is not None
    endpoints.add("gate", gate.section.model_copy(update={"allow_http": True}), gate.secret)
    code, steps, _ = imported("--cache", tmpfs)
    assert (code, steps["gate"]["action"], steps["cloud"]["action"]) == (1, "present", "failed")
    assert "pbs7" in steps["cloud"]["why"]
    assert "--overwrite-in-use" in steps["cloud"]["why"]
    code, steps, _ = imported("--cache", tmpfs, "--overwrite-in-use")
    assert (code, steps["cloud"]["action"]) == (0, "take-over")
    assert (tmpfs / "cloud/vm/100/owner").read_text() == "root@pam\n"
    assert Registry(datastores_file()).datastores()["cloud"].s3 == S3Place("gate", BUCKET)
    counters = CounterFile(tmpfs / "cloud", Owner.of(tmpfs))
    assert counters.read().counts["s3-put"] == 2, (
        "what taking it over cost is counted: the mark, and the chunk of zeros"
    )
    assert {name: value for name, value in counters.read().thresholds.items() if value} == {
        "s3-put": 9,
        "s3-download": 1 << 30,
    }
    assert (counters.period().schedule, counters.period().until is not None) == ("weekly", True)
    assert b"fleece" in s3_emulator.bucket.objects["cloud/.in-use"].data
