"""What a QEMU that nobody has checked is left of this process's rights."""

import os
from pathlib import Path

import pytest
import trio

from hypervisor.confined import Limits, confined

LIMITS = Limits(64 << 20, 1 << 30)
#: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER and CAP_SYS_PTRACE: those of the agent's unit.
OF_THE_UNIT = 0x8000F
#: CAP_SETGID and CAP_SETUID, without CAP_KILL.
CHANGES_USERS = 0xC0


async def status_of(program: str) -> dict[str, str]:
    """Fields of /proc/self/status that `program`, a kind of cat, sees of itself."""
    line = await confined([program, "/proc/self/status"], LIMITS)
    done = await trio.run_process(line, capture_stdout=True)
    return dict(line.split(":\t", 1) for line in done.stdout.decode().splitlines())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to lose")
@pytest.mark.parametrize("capable", [OF_THE_UNIT, OF_THE_UNIT | CHANGES_USERS], ids=["unit", "could not end nobody"])
async def test_root_that_cannot_become_nobody_has_no_capabilities(
    monkeypatch: pytest.MonkeyPatch, capable: int
) -> None:
    monkeypatch.setattr("hypervisor.confined._capabilities", lambda: capable)
    status = await status_of("cat")
    assert status["Uid"].split() == ["0"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can open what others may not")
async def test_a_program_that_others_may_not_run_keeps_what_it_needs_for_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hypervisor.confined._capabilities", lambda: OF_THE_UNIT)
    home = tmp_path / "home"
    home.mkdir()
    program = home / "cat"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o755)
    os.chown(home, 65534, 65534)
    home.chmod(0o700)
    assert (await status_of(str(program)))["CapEff"] != "0" * 16


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
async def test_root_with_all_rights_becomes_nobody_without_any() -> None:
    status = await status_of("cat")
    assert status["Uid"].split() == ["65534"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
