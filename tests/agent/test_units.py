"""The files in systemd/: what systemd itself says of them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cache import ROOT

UNITS = ROOT / "systemd"
#: Exposure that each service may have at most, as `systemd-analyze security` rates it. A mount that is to be seen by
#: others cannot have file systems of its own, which half of what is rated needs.
MOST = {
    "fleece-agent.service": 3.0,
    "fleece-job@.service": 3.0,
    "fleece-serve.service": 3.0,
    "fleece-mount@.service": 4.3,
}


def analyze(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd rates the units, and this host has no systemd-analyze (containers often lack it)")
    return subprocess.run(
        [program, "--no-pager", *map(str, arguments)],
        capture_output=True, text=True, check=False, env={"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/bin"},
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.glob("*.service")))
def test_services_may_do_no_more_than_they_need(name: str) -> None:
    done = analyze("security", "--offline=true", UNITS / name)
    match = re.search(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert match is not None, done
    assert float(match[1]) <= MOST[name], done.stdout


def test_the_timer_and_the_agent_take_away_the_same() -> None:
    def hardening(name: str) -> list[str]:
        lines = (UNITS / name).read_text().splitlines()
        begin = next(number for number, line in enumerate(lines) if line.startswith("CapabilityBoundingSet"))
        return sorted(line for line in lines[begin:] if "=" in line and not line.startswith("WantedBy"))

    assert hardening("fleece-agent.service") == hardening("fleece-job@.service")


@pytest.mark.parametrize("name", ["fleece-agent.service", "fleece-job@.service"])
def test_what_takes_too_much_memory_ends_alone(name: str) -> None:
    """By itself systemd ends a whole service with the first of its processes that the kernel kills so."""
    assert "OOMPolicy=continue" in (UNITS / name).read_text().splitlines()


def test_systemd_understands_every_unit(tmp_path: Path) -> None:
    copies = []
    for path in sorted(UNITS.iterdir()):
        if path.suffix in (".service", ".socket", ".timer", ".mount"):
            text = re.sub(r"/usr/\S*/fleece(?=\s)", "/bin/true", path.read_text())
            copy = tmp_path / path.name.replace("@", "@x")
            copy.write_text(text)
            copies.append(copy)
    assert len(copies) >= 7
    done = analyze("verify", "--man=no", "--recursive-errors=no", *copies)
    ours = [line for line in done.stderr.splitlines() if "fleece" in line or "mnt-backup" in line]
    assert ours == [], done.stderr
