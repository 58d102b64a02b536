"""How the files of a snapshot are protected."""

from enum import Enum


class CryptMode(Enum):
    """Crypt mode as manifests write it."""

    NONE = "none"
    ENCRYPT = "encrypt"  #: chunks and blobs encrypted, keyed digests, manifest signed
    SIGN_ONLY = "sign-only"  #: plain chunks with plain digests, manifest signed
