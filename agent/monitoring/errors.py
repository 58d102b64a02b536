"""Errors of monitoring.

FleeceError
└── DeliveryError    a notification was not taken
"""

from core.errors import FleeceError


class DeliveryError(FleeceError):
    """A notification was not taken; `temporary`: it may be a little later."""

    def __init__(self, what: str, where: str, why: str, hint: str = "", *, temporary: bool = False) -> None:
        super().__init__(what, where, why, hint)
        self.temporary = temporary
