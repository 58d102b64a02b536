"""Auth-ids: users (`name@realm`) and their API tokens (`name@realm!token`)."""

import re
from dataclasses import dataclass
from typing import Final, Self

from core.errors import UsageError

SAFE_ID: Final = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"
USER_PATTERN: Final = rf"[^\s:/\x00-\x1f\x7f!@]+@{SAFE_ID}"
USER_ID: Final = re.compile(USER_PATTERN)
AUTH_ID: Final = re.compile(rf"{USER_PATTERN}(?:!{SAFE_ID})?")
#: A group of users, in rights: `@name`. Nobody is a member of one.
GROUP_ID: Final = re.compile(rf"@{SAFE_ID}")
MIN_LENGTH: Final = 3
MAX_LENGTH: Final = 64
_REALM: Final = (2, 32)


@dataclass(frozen=True, slots=True)
class AuthId:
    """A user, or one of its tokens."""

    user: str  #: `name@realm`
    token: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name@realm` or `name@realm!token`.

        Raises:
            UsageError: another form, or too long.
        """
        if AUTH_ID.fullmatch(text) is None or not MIN_LENGTH <= len(text) <= MAX_LENGTH:
            raise UsageError("use the auth-id", repr(text), "it is not of the form name@realm or name@realm!token")
        user, _, token = text.partition("!")
        if not _REALM[0] <= len(user.rpartition("@")[2]) <= _REALM[1]:
            raise UsageError("use the auth-id", repr(text), "a realm has 2 to 32 characters")
        return cls(user, token or None)

    @property
    def realm(self) -> str:
        """Where its password is kept."""
        return self.user.rpartition("@")[2]

    @property
    def is_root(self) -> bool:
        """True for `root@pam` itself, who may do everything; not for its tokens."""
        return self.token is None and self.user == "root@pam"

    def owns(self, owner: str) -> bool:
        """True if a group of `owner` is this one's: its own, or that of one of the user's tokens (spec 5.5)."""
        return owner == str(self) or (self.token is None and owner.startswith(f"{self.user}!"))

    def __str__(self) -> str:
        return self.user if self.token is None else f"{self.user}!{self.token}"


#: The superuser.
ROOT_USER: Final = AuthId("root@pam")


def parse_holder(text: str) -> str:
    """Return `text` if rights can be given to it: a user, a token, or a group `@name`.

    Raises:
        UsageError: another form, or too long.
    """
    if text.startswith("@") and GROUP_ID.fullmatch(text) is not None and len(text) <= MAX_LENGTH:
        return text
    return str(AuthId.parse(text))
