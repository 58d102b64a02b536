"""Users, API tokens and rights, in TOML files that only programs write; and who a request comes from."""

import hashlib
import hmac
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import FleeceError, NotFoundError, UsageError
from core.state_files import Plain, StateFile
from server.access.acl import AclEntry, AclTree, check_path
from server.access.auth_ids import ROOT_USER, AuthId, parse_holder
from server.access.passwords import MAX_PASSWORD, hash_password, verify_password
from server.access.roles import ROLES
from server.access.turns import Turns

#: Realms that a user may be of: the server keeps the passwords of both.
REALMS: Final = ("pam", "pbs")
MIN_PASSWORD: Final = 8
_TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]*")
_REPAIR: Final = "repair or remove the file; 'fleece user', 'fleece token' and 'fleece acl' write it anew"
#: Secrets of tokens that were right lately and need not be hashed again.
_MAX_REMEMBERED: Final = 1024
#: Tokens of a user, and rights of a user and its tokens together: anybody who can log in may add some.
MAX_TOKENS: Final = 256
MAX_RIGHTS: Final = 1024


@dataclass(frozen=True, slots=True)
class Account:
    """A user or a token."""

    auth_id: AuthId
    hash: str | None  #: of the password or secret; None: it cannot log in
    comment: str = ""
    enabled: bool = True
    expire: int = 0  #: Unix seconds; 0: never

    def active(self, now: float) -> bool:
        """True if it may be used."""
        return self.enabled and (not self.expire or self.expire > now)


class AccessStore:
    """The files in the folder `state`. Changes by other processes are seen at once."""

    def __init__(self, state: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._accounts_file: Final = StateFile(
            state / "users.toml", "user", "the list of users", "Users and API tokens. Written by 'fleece user' and"
            " 'fleece token', not for editing by hand.", _REPAIR, mode=0o600,
        )  # fmt: skip
        self._acl_file: Final = StateFile(
            state / "acl.toml", "acl", "the list of rights", "Rights. Written by 'fleece acl', not for editing by"
            " hand.", _REPAIR, mode=0o600,
        )  # fmt: skip
        self._accounts: tuple[object, dict[str, Account]] = (None, {})
        self._tree: tuple[object, AclTree] = (None, AclTree())
        self._remembered: dict[bytes, str] = {}
        self._remember_key: Final = os.urandom(32)
        self._turns: Final = Turns()

    # Reading.

    def accounts(self) -> dict[str, Account]:
        """All users and tokens by auth-id.

        Raises:
            FleeceError: the file cannot be read.
        """
        stamp = _stamp(self._accounts_file.path)
        if stamp != self._accounts[0] or stamp is None:
            self._accounts = (stamp, {name: self._account(name, t) for name, t in self._accounts_file.read().items()})
        return self._accounts[1]

    def _account(self, name: str, table: dict[str, Any]) -> Account:
        try:
            auth_id = AuthId.parse(name)
        except UsageError as error:
            raise self._accounts_file.wrong(f"user.{name}: {error.why}") from None
        kept, comment, enabled, expire = (
            table.get("hash"), table.get("comment", ""), table.get("enabled", True), table.get("expire", 0),
        )  # fmt: skip
        if not (
            (kept is None or isinstance(kept, str))
            and isinstance(comment, str)
            and isinstance(enabled, bool)
            and isinstance(expire, int)
        ):
            raise self._accounts_file.wrong(f"user.{name}: a value has another type")
        return Account(auth_id, kept, comment, enabled, expire)

    def account(self, auth_id: AuthId) -> Account | None:
        """The user or token; the superuser is always there."""
        found = self.accounts().get(str(auth_id))
        return Account(ROOT_USER, None, "Superuser") if found is None and auth_id == ROOT_USER else found

    def active(self, auth_id: AuthId) -> bool:
        """True if the user, and for a token the token too, exists, is enabled and has not expired."""
        now = self._clock()
        wanted = {auth_id, AuthId(auth_id.user)}
        return all((account := self.account(one)) is not None and account.active(now) for one in wanted)

    def tree(self) -> AclTree:
        """All rights.

        Raises:
            FleeceError: the file cannot be read.
        """
        stamp = _stamp(self._acl_file.path)
        if stamp != self._tree[0] or stamp is None:
            self._tree = (stamp, AclTree(self._entry(name, table) for name, table in self._acl_file.read().items()))
        return self._tree[1]

    def _entry(self, name: str, table: dict[str, Any]) -> AclEntry:
        path, auth_id, role = (table.get(key) for key in ("path", "auth-id", "role"))
        propagate = table.get("propagate", True)
        texts = isinstance(path, str) and isinstance(auth_id, str) and isinstance(role, str)
        if not texts or role not in ROLES or not isinstance(propagate, bool):
            raise self._acl_file.wrong(f"acl.{name} is no right")
        try:
            return AclEntry(check_path(str(path)), parse_holder(str(auth_id)), str(role), propagate)
        except UsageError as error:
            raise self._acl_file.wrong(f"acl.{name}: {error.why}") from None

    # Checking.

    async def check_password(self, user: AuthId, password: str, peer: str = "") -> bool:
        """True if `password` is that of the active user; the checks for one `peer` wait for each other."""
        account = self.account(user)
        kept = account.hash if account is not None and self.active(user) and user.token is None else None
        if len(password) > MAX_PASSWORD:
            return False
        return await self._turns.run(peer, lambda: verify_password(password, kept))

    async def check_secret(self, token: AuthId, secret: str, peer: str = "") -> bool:
        """True if `secret` is that of the token, which exists; the checks for one `peer` wait for each other."""
        account = self.account(token)
        kept = None if account is None or token.token is None else account.hash
        if kept is None or len(secret) > MAX_PASSWORD:
            return False
        mark = hmac.new(self._remember_key, f"{token}\n{secret}".encode("utf-8", "replace"), hashlib.sha256).digest()
        if self._remembered.get(mark) == kept:
            return True
        right = await self._turns.run(peer, lambda: verify_password(secret, kept))
        if right:
            while len(self._remembered) >= _MAX_REMEMBERED:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[mark] = kept
        return right

    # Changing.

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Account]]:
        with self._accounts_file.changing():
            known = {name: self._account(name, table) for name, table in self._accounts_file.read().items()}
            yield known
            self._accounts_file.write({name: _table(account) for name, account in known.items()})

    def add_user(self, user: AuthId, *, password: str | None = None, comment: str = "", expire: int = 0) -> None:
        """Add a user; without a password it can only be used by its tokens.

        Raises:
            UsageError: a token's id, an unknown realm, a password that is too short or long.
            FleeceError: it exists already, or the file cannot be written.
        """
        if user.token is not None or user.realm not in REALMS:
            raise UsageError("add the user", str(user), f"it must be name@realm, the realm one of {', '.join(REALMS)}")
        kept = None if password is None else hash_password(_checked(password, user))
        with self._changing() as known:
            if str(user) in known:
                raise FleeceError("add the user", str(user), "it exists already")
            known[str(user)] = Account(user, kept, comment, True, expire)

    def set_password(self, user: AuthId, password: str) -> None:
        """Give the user another password.

        Raises:
            NotFoundError: there is no such user.
            UsageError: too short or long.
        """
        kept = hash_password(_checked(password, user))
        with self._changing() as known:
            old = known.get(str(user), Account(user, None, "Superuser") if user == ROOT_USER else None)
            if old is None or user.token is not None:
                raise NotFoundError("set the password of", str(user), "there is no such user")
            known[str(user)] = Account(user, kept, old.comment, old.enabled, old.expire)

    def remove_user(self, user: AuthId) -> None:
        """Remove a user, its tokens, and the rights of all of them.

        Raises:
            NotFoundError: there is no such user.
        """
        with self._changing() as known:
            if known.pop(str(user), None) is None or user.token is not None:
                raise NotFoundError("remove the user", str(user), "there is no such user")
            for name in [name for name in known if name.startswith(f"{user}!")]:
                del known[name]
        self._drop_rights(lambda auth_id: auth_id == str(user) or auth_id.startswith(f"{user}!"))

    def add_token(self, token: AuthId, *, comment: str = "", expire: int = 0) -> str:
        """Add a token and return its secret, which is kept nowhere else.

        Raises:
            NotFoundError: there is no such user.
            FleeceError: the token exists already.
        """
        if token.token is None or _TOKEN_NAME.fullmatch(token.token) is None:
            raise UsageError("add the token", str(token), "it is not of the form name@realm!token")
        secret = str(uuid.uuid4())
        kept = hash_password(secret)
        with self._changing() as known:
            if token.user not in known and AuthId(token.user) != ROOT_USER:
                raise NotFoundError("add the token", str(token), f"there is no user {token.user}")
            if str(token) in known:
                raise FleeceError("add the token", str(token), "it exists already")
            if sum(name.startswith(f"{token.user}!") for name in known) >= MAX_TOKENS:
                raise FleeceError("add the token", str(token), f"{token.user} has {MAX_TOKENS} already")
            known[str(token)] = Account(token, kept, comment, True, expire)
        return secret

    def remove_token(self, token: AuthId) -> None:
        """Remove a token and its rights.

        Raises:
            NotFoundError: there is no such token.
        """
        with self._changing() as known:
            if token.token is None or known.pop(str(token), None) is None:
                raise NotFoundError("remove the token", str(token), "there is no such token")
        self._drop_rights(lambda auth_id: auth_id == str(token))

    def set_right(self, entry: AclEntry, *, delete: bool = False) -> None:
        """Give a right, or take it away.

        Raises:
            UsageError: no such role or path.
            NotFoundError: there is no such user or token, or it has not that right.
        """
        if entry.role not in ROLES:
            raise UsageError("change the rights", entry.path, f"there is no role {entry.role!r}: {', '.join(ROLES)}")
        entry = AclEntry(check_path(entry.path), entry.auth_id, entry.role, entry.propagate)
        holder = parse_holder(entry.auth_id)
        if not delete and not holder.startswith("@") and self.account(AuthId.parse(holder)) is None:
            raise NotFoundError("change the rights", entry.path, f"there is no user or token {entry.auth_id}")
        with self._acl_file.changing():
            tables = self._acl_file.read()
            name = f"{entry.path} {entry.auth_id} {entry.role}"
            if delete:
                if tables.pop(name, None) is None:
                    why = f"{entry.auth_id} has not the role {entry.role} there"
                    raise NotFoundError("change the rights", entry.path, why)
            else:
                user = entry.auth_id.partition("!")[0]
                owned = [one for one in tables.values() if str(one.get("auth-id")).partition("!")[0] == user]
                if name not in tables and len(owned) >= MAX_RIGHTS:
                    why = f"{user} and its tokens have {MAX_RIGHTS} rights already"
                    raise FleeceError("change the rights", entry.path, why)
                tables[name] = {
                    "path": entry.path,
                    "auth-id": entry.auth_id,
                    "role": entry.role,
                    "propagate": entry.propagate,
                }
            self._acl_file.write(tables)

    def _drop_rights(self, whose: Callable[[str], bool]) -> None:
        with self._acl_file.changing():
            tables = self._acl_file.read()
            kept = {name: table for name, table in tables.items() if not whose(str(table.get("auth-id")))}
            if len(kept) != len(tables):
                self._acl_file.write(kept)


def _table(account: Account) -> dict[str, Plain | None]:
    return {
        "hash": account.hash,
        "comment": account.comment or None,
        "enabled": None if account.enabled else False,
        "expire": account.expire or None,
    }


def _checked(password: str, user: AuthId) -> str:
    if not MIN_PASSWORD <= len(password.encode("utf-8", "replace")) <= MAX_PASSWORD:
        why = f"a password has {MIN_PASSWORD} to {MAX_PASSWORD} bytes"
        raise UsageError("set the password of", str(user), why)
    return password


def _stamp(path: Path) -> object:
    """Changes whenever the file does, which is always replaced as a whole; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
