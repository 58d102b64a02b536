"""AWS Signature Version 4 in its header form, service `s3`.

Everything that is sent is signed. The caller gives path and headers exactly as they go on the wire.
"""

import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

EMPTY_SHA256: Final = hashlib.sha256(b"").hexdigest()
_ALGORITHM: Final = "AWS4-HMAC-SHA256"


def encode_path(path: str) -> str:
    """`path` with everything but letters, digits, `-._~` and `/` as `%XX` (R9)."""
    return quote(path, safe="/-._~")


def encode_query(pairs: Sequence[tuple[str, str | None]]) -> str:
    """The query as it goes on the wire: a parameter without value has no `=`."""
    return "&".join(
        quote(name, safe="-._~") + ("" if value is None else "=" + quote(value, safe="-._~")) for name, value in pairs
    )


def format_date(now: float) -> str:
    """`now` (Unix seconds) as in the header `x-amz-date`."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))


def signing_key(secret: str, day: str, region: str) -> bytes:
    """The key that is valid for `day` (`YYYYMMDD`)."""
    key = b"AWS4" + secret.encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


class Signer:
    """Signs for one pair of keys in one region."""

    def __init__(self, access_key: str, secret: str, region: str) -> None:
        self._access_key = access_key
        self._secret = secret
        self._region = region
        self._day = ""
        self._key = b""

    def canonical_request(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str | None]],
        headers: Sequence[tuple[str, str]],
        payload: str,
    ) -> tuple[str, str]:
        """The text that is signed, and the names of the signed headers.

        Args:
            method: `GET`, ...
            path: encoded, as sent.
            query: not encoded.
            headers: names in lower case; all of them are signed.
            payload: hex SHA-256 of the body.
        """
        ordered = sorted(headers)
        names = ";".join(name for name, _ in ordered)
        pairs = sorted(encode_query([(name, value or "")]) for name, value in query)
        lines = [method, path, "&".join(pairs), *(f"{name}:{value.strip()}" for name, value in ordered)]
        return "\n".join([*lines, "", names, payload]), names

    def authorization(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str | None]],
        headers: Sequence[tuple[str, str]],
        payload: str,
        date: str,
    ) -> str:
        """The value of the header `authorization`; arguments as above, `date` that of `x-amz-date`."""
        canonical, names = self.canonical_request(method, path, query, headers, payload)
        day = date[:8]
        if day != self._day:
            self._key, self._day = signing_key(self._secret, day, self._region), day
        scope = f"{day}/{self._region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"{_ALGORITHM}\n{date}\n{scope}\n{digest}"
        signature = hmac.digest(self._key, text.encode(), "sha256").hex()
        return f"{_ALGORITHM} Credential={self._access_key}/{scope},SignedHeaders={names},Signature={signature}"
