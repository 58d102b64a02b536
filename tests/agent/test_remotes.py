"""Fingerprints, tickets, secrets and options of servers, as commands keep them."""

from pathlib import Path

import pytest

from agent.config import parse_config
from agent.fingerprints import FingerprintFile
from agent.remote_spec import RemoteSpec
from agent.remotes import CommandSecrets, RenewedTickets, remote_options
from agent.tickets import TicketFile
from core.errors import UsageError
from repository.remote.address import RemoteAddress
from repository.remote.login import Ticket

ADDRESS = RemoteAddress("store", "pbs.example", 8007, "b@pbs")


def test_a_confirmed_fingerprint_is_remembered_by_server(tmp_path: Path) -> None:
    file = FingerprintFile(tmp_path / "deep/fingerprints")
    one, other = RemoteAddress("store", "PBS.example"), RemoteAddress("store", "pbs.example", 8443)
    assert file.find(one) is None
    file.remember(one, b"\x01" * 32)
    file.remember(other, b"\x02" * 32)
    file.remember(one, b"\x03" * 32)
    assert (file.find(one), file.find(other)) == (b"\x03" * 32, b"\x02" * 32)
    assert file.path.read_text().splitlines()[-1] == f"pbs.example {':'.join(['03'] * 32)}"


@pytest.fixture
def tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TicketFile:
    monkeypatch.setenv("FLEECE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("PBS_PASSWORD", "PBS_FINGERPRINT", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return TicketFile(tmp_path / "run/tickets.json")


def test_tickets_are_kept_for_nobody_else(tickets: TicketFile) -> None:
    import time

    ticket = Ticket("PBS:b@pbs:1::x", "csrf", time.time())
    assert tickets.load(ADDRESS) is None
    assert not tickets.forget(ADDRESS)
    tickets.save(ADDRESS, ticket)
    tickets.save(RemoteAddress("store", "old", 8007, "b@pbs"), Ticket("t", "c", time.time() - 9000))
    assert tickets.path.stat().st_mode & 0o777 == 0o600
    assert tickets.load(ADDRESS) == ticket
    # The same user on the same server, whatever the datastore; others have none.
    assert tickets.load(RemoteAddress("other", "PBS.example", 8007, "b@pbs")) == ticket
    assert tickets.load(RemoteAddress("store", "pbs.example", 8008, "b@pbs")) is None
    tickets.save(ADDRESS, ticket)
    assert "old" not in tickets.path.read_text()  # expired
    tickets.path.chmod(0o644)  # others may have read it
    assert tickets.load(ADDRESS) is None
    tickets.path.chmod(0o600)
    tickets.path.write_text("[" * 100_000)
    assert tickets.load(ADDRESS) is None


def test_a_command_renews_a_ticket_but_stores_none_of_its_own(tickets: TicketFile) -> None:
    import time

    one, two = Ticket("one", "c", time.time()), Ticket("two", "c", time.time())
    renewed = RenewedTickets(tickets)
    assert renewed.load(ADDRESS) is None
    renewed.save(ADDRESS, one)
    assert tickets.load(ADDRESS) is None
    tickets.save(ADDRESS, one)
    assert renewed.load(ADDRESS) == one
    renewed.save(ADDRESS, two)
    assert tickets.load(ADDRESS) == two


@pytest.mark.usefixtures("tickets")
async def test_secrets_come_from_the_environment_then_from_the_configured_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    path.write_text("of the file\nsecond line\n")
    text = f'[repository.offsite]\nserver = "pbs.example:store"\npassword-file = "{path}"\n'
    section = parse_config(text, "f").repository["offsite"]
    assert await CommandSecrets(section, may_ask=False).password(ADDRESS) == "of the file"
    monkeypatch.setenv("PBS_PASSWORD_CMD", "printf 'of the command'")
    assert await CommandSecrets(section, may_ask=False).password(ADDRESS) == "of the command"
    monkeypatch.setenv("PBS_PASSWORD", "of the environment")
    assert await CommandSecrets(section, may_ask=False).password(ADDRESS) == "of the environment"
    monkeypatch.delenv("PBS_PASSWORD")
    monkeypatch.delenv("PBS_PASSWORD_CMD")
    assert await CommandSecrets(None, may_ask=False).password(ADDRESS) is None


@pytest.mark.usefixtures("tickets")
def test_options_come_from_environment_configuration_and_what_was_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.remotes import fingerprints

    spec = RemoteSpec(ADDRESS)
    assert remote_options(spec, may_ask=False).pin.fingerprint is None
    fingerprints().remember(ADDRESS, b"\x01" * 32)
    assert remote_options(spec, may_ask=False).pin.fingerprint == b"\x01" * 32
    text = f"""
        [repository.offsite]
        server = "b@pbs@pbs.example:store"
        fingerprint = "{":".join(["02"] * 32)}"
        fingerprint-only = true
        rate-in = "1M"
        rate-out = "2M"
        burst-out = "8M"
        uploads = 40
    """
    spec = RemoteSpec(ADDRESS, parse_config(text, "f").repository["offsite"])
    options = remote_options(spec, may_ask=False)
    assert (options.pin.fingerprint, options.pin.only) == (b"\x02" * 32, True)
    assert (options.rate_in, options.rate_out, options.burst_in, options.burst_out) == (1 << 20, 2 << 20, None, 8 << 20)
    assert (options.uploads, remote_options(RemoteSpec(ADDRESS), may_ask=False).uploads) == (40, 16)
    monkeypatch.setenv("PBS_FINGERPRINT", ":".join(["03"] * 32))
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    options = remote_options(spec, may_ask=False)
    assert options.pin.fingerprint == b"\x03" * 32
    assert options.proxy is not None
    assert str(options.proxy) == "proxy.example:3128"
    monkeypatch.setenv("PBS_FINGERPRINT", "abc")
    with pytest.raises(UsageError):
        remote_options(spec, may_ask=False)
