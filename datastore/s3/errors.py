"""Errors of the S3 backend.

StoreError
└── S3Error                     anything that an endpoint refused or that kept us from it; has `status` and `code`
    ├── S3BackendError          the whole bucket is out of reach for good: keys, rights, bucket gone, wrong region
    │   ├── S3ClockError        clocks differ too much for a signature
    │   └── S3CertificateError  neither a valid certificate nor the pinned one
    ├── S3UnavailableError      no answer after all attempts
    │   ├── S3ThrottledError    the endpoint kept asking for fewer requests
    │   └── S3UnknownOutcomeError   a change was sent and may still be carried out
    ├── S3ObjectError           this one object cannot be used (in an archive tier, too large)
    ├── S3AnswerError           an answer that no server should give
    └── S3BudgetError           the limit on requests or bytes of this job is reached
"""

from datastore.errors import StoreError


class S3Error(StoreError):
    """An endpoint refused something, or could not be asked."""

    def __init__(self, what: str, where: str, why: str, hint: str = "", *, status: int = 0, code: str = "") -> None:
        super().__init__(what, where, why, hint)
        self.status = status  #: HTTP status, 0 without an answer
        self.code = code  #: S3's code, `AccessDenied`; empty if the answer had none


class S3BackendError(S3Error):
    """Nothing in this bucket can be used until a person changes something; never "chunk missing"."""


class S3ClockError(S3BackendError):
    """The clocks of this machine and the endpoint differ too much."""


class S3CertificateError(S3BackendError):
    """The endpoint's certificate is not valid and not the pinned one."""


class S3UnavailableError(S3Error):
    """No usable answer after all attempts."""


class S3ThrottledError(S3UnavailableError):
    """The endpoint kept asking for fewer requests."""


class S3UnknownOutcomeError(S3UnavailableError):
    """A write or delete was sent, and nobody knows whether it was or will be carried out (R31)."""


class S3ObjectError(S3Error):
    """This one object cannot be used."""


class S3AnswerError(S3Error):
    """An answer that no server should give: bad XML, another length than announced, no ETag."""


class S3BudgetError(S3Error):
    """The limit on requests or bytes of this job is reached."""
