"""Tokens, tickets and their renewal."""

import pytest
import trio

from core.errors import UsageError
from datastore.names import Group
from repository.remote.address import RemoteAddress
from repository.remote.errors import RemoteLoginError
from repository.remote.login import Ticket
from tests.support.pbs_double import PbsDouble
from tests.support.remote import TOKEN, USER, Known, remote
from tests.support.snapshots import write_snapshot

GROUP = Group.parse("vm/100")


class Kept:
    """A store of one ticket."""

    def __init__(self) -> None:
        self.ticket: Ticket | None = None

    def load(self, address: RemoteAddress) -> Ticket | None:
        return self.ticket

    def save(self, address: RemoteAddress, ticket: Ticket) -> None:
        self.ticket = ticket

    def forget(self, address: RemoteAddress) -> bool:
        self.ticket = None
        return True


@pytest.mark.parametrize(
    ("text", "auth_id", "host", "port", "store"),
    [
        ("pbs:store", "root@pam", "pbs", 8007, "store"),
        ("b@pbs@pbs:store", "b@pbs", "pbs", 8007, "store"),
        ("b@pbs!t@pbs.example.com:8443:store", "b@pbs!t", "pbs.example.com", 8443, "store"),
        ("u@x@pbs@[2001:db8::7]:8007:store", "u@x@pbs", "2001:db8::7", 8007, "store"),
        ("[::1]:store", "root@pam", "::1", 8007, "store"),
        ("bücher.example:store", "root@pam", "xn--bcher-kva.example", 8007, "store"),
    ],
)
def test_repository_strings_are_split_at_the_last_at(text: str, auth_id: str, host: str, port: int, store: str) -> None:
    address = RemoteAddress.parse(text)
    assert (address.auth_id, address.host, address.port, address.store) == (auth_id, host, port, store)
    assert RemoteAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["store", "a:b", "@h:store", "u@h:store", "h:0:store", "h:99999:store", "h:/store", "a..b:store"]
)
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        RemoteAddress.parse(text)


async def test_a_token_is_sent_with_an_equals_sign_and_its_secret_encoded() -> None:
    double = PbsDouble()
    async with remote(double) as repo:
        await write_snapshot(repo, GROUP, 1000, {"a.conf.blob": b"x"})
        assert await repo.snapshots() != []
    assert double.logins == 0
    async with remote(double, secrets=Known("wrong")) as repo:
        with pytest.raises(RemoteLoginError, match="invalid token secret") as caught:
            await repo.snapshots()
        assert "wrong" not in str(caught.value)
        with pytest.raises(RemoteLoginError):
            await write_snapshot(repo, GROUP, 2000, {"a.conf.blob": b"x"})
    async with remote(double, TOKEN, secrets=Known(None)) as repo:
        with pytest.raises(RemoteLoginError, match="there is no secret of the API token"):
            await repo.snapshots()


async def test_a_ticket_serves_reads_and_changes_and_is_renewed_with_itself() -> None:
    double = PbsDouble()
    secrets, kept = Known("geheim"), Kept()
    async with remote(double, USER, secrets=secrets, tickets=kept) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, {"a.conf.blob": b"x"})
        await repo.set_notes(snapshot, "changed")
        assert (double.logins, secrets.asked) == (1, 1)
    assert kept.ticket is not None
    kept.ticket = Ticket(kept.ticket.ticket, kept.ticket.csrf, kept.ticket.issued - 1000)
    async with remote(double, USER, secrets=secrets, tickets=kept) as repo:
        await repo.snapshots()
        assert (double.logins, secrets.asked) == (2, 1)  # renewed, without the password


@pytest.mark.parametrize("how", ["old", "forgotten"])
async def test_an_expired_ticket_is_replaced_in_the_middle_of_the_work(how: str) -> None:
    double = PbsDouble()
    secrets, kept = Known("geheim"), Kept()
    async with remote(double, USER, secrets=secrets, tickets=kept) as repo:
        await repo.snapshots()
        if how == "forgotten":
            double.tickets.clear()
        else:
            assert kept.ticket is not None
            repo.server.credentials._ticket = Ticket(kept.ticket.ticket, kept.ticket.csrf, 5.0)  # type: ignore[attr-defined]
        await write_snapshot(repo, GROUP, 1000, {"a.conf.blob": b"x"})
        double.tickets.clear()
        async with repo.reader(GROUP.at(1000)) as reader:
            assert await reader.manifest()
    assert double.logins >= 2


async def test_without_a_password_an_expired_ticket_is_an_error_that_says_what_to_do() -> None:
    double = PbsDouble()
    kept = Kept()
    kept.ticket = Ticket("PBS:old", "CSRF", 5.0)
    async with remote(double, USER, secrets=Known(None), tickets=kept) as repo:
        with pytest.raises(RemoteLoginError, match="run 'fleece login'"):
            await repo.snapshots()
    async with remote(double, USER, secrets=Known("falsch")) as repo:
        with pytest.raises(RemoteLoginError, match=r"permission check failed\."):
            await repo.snapshots()


async def test_many_requests_whose_ticket_has_expired_share_one_new_login() -> None:
    """Each of them is refused once; whoever is second must neither fail nor throw the new ticket away."""
    double = PbsDouble()
    secrets = Known("geheim")
    async with remote(double, USER, secrets=secrets) as repo:
        snapshot = await write_snapshot(repo, GROUP, 1000, {"a.conf.blob": b"x"})
        async with repo.reader(snapshot) as reader:
            logins = double.logins
            double.tickets.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(repo.snapshots)
                nursery.start_soon(reader.manifest)
    assert double.logins == logins + 1


async def test_a_new_ticket_is_used_by_whoever_was_refused_with_an_older_one() -> None:
    double = PbsDouble()
    async with remote(double, USER, secrets=Known("geheim")) as repo:
        credentials = repo.server.credentials
        old = await credentials.headers("GET")
        assert await credentials.refused(old)
        assert await credentials.refused(old)  # the second task that was refused, before there is a new one
        new = await credentials.headers("GET")
        assert new != old
        assert await credentials.refused(old)
        assert await credentials.headers("GET") == new
