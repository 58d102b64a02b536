"""The server's certificate: made at the first start, or the user's own; loaded anew when asked."""

import datetime
import hashlib
import ipaddress
import os
import re
import socket
import ssl
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import os_reason
from server.errors import ServerError

#: Years that a certificate of our own is valid; clients pin it, so nothing is won by an end.
_YEARS: Final = 900


class Certificate:
    """A certificate with its key, in files."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._key = key
        self.context, self._fingerprint = self._loaded()

    def reload(self) -> None:
        """Read the files again; new connections use what is in them.

        Raises:
            ServerError: they cannot be used; the old ones stay in use.
        """
        self.context, self._fingerprint = self._loaded()

    def _loaded(self) -> tuple[ssl.SSLContext, str]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_SINGLE_ECDH_USE
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!MD5")
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
            fingerprint = _fingerprint(self._certificate.read_text(encoding="ascii", errors="replace"))
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = os_reason(error) if isinstance(error, OSError) and error.strerror else str(error)
            where = f"{self._certificate} with {self._key}"
            raise ServerError("use the certificate", where, reason, "it must be PEM, and the key its own") from error
        return context, fingerprint

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate that is in use, 32 pairs of hex digits."""
        return self._fingerprint


def _fingerprint(pem: str) -> str:
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", pem, re.DOTALL)
    if found is None:
        raise ValueError("no certificate is in the file")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[0] + "\n")).digest().hex(":")


def _no_password() -> str:
    raise ValueError("its key has a passphrase")


def own_certificate(folder: Path) -> Certificate:
    """The server's own certificate in `folder`, made if it is missing.

    Raises:
        ServerError: it cannot be made or read.
    """
    certificate, key = folder / "server.pem", folder / "server.key"
    if not certificate.exists() or not key.exists():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make(certificate, key)
        except OSError as error:
            raise ServerError("make the certificate", str(certificate), os_reason(error)) from error
    return Certificate(certificate, key)


def _make(certificate: Path, key: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    host = socket.getfqdn() or "localhost"
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Fleece"),
            x509.NameAttribute(NameOID.COMMON_NAME, host[:64]),
        ]
    )
    names: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    short = socket.gethostname()
    names += [
        x509.DNSName(one) for one in dict.fromkeys((short, host)) if one.isascii() and one not in ("", "localhost")
    ]
    # Only the date: when a server was set up is nobody's business.
    start = datetime.datetime.combine(datetime.date.today() - datetime.timedelta(days=1), datetime.time())
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=365 * _YEARS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, data, mode in ((key, pem, 0o600), (certificate, built.public_bytes(serialization.Encoding.PEM), 0o644)):
        temporary = path.with_suffix(f"{path.suffix}.tmp")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
