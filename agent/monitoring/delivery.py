"""Sending one notification: its way, tried a few times."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from agent.errors import first_cause
from agent.monitoring.errors import DeliveryError
from core.errors import FleeceError

if TYPE_CHECKING:
    from agent.monitoring.messages import Message
    from agent.monitoring.sections import AnyNotify

#: Seconds before the second and third attempt; a longer fault is left to later (`agent.monitoring.rules`).
PAUSES_S: Final = (2.0, 10.0)


async def deliver(
    section: "AnyNotify", message: "Message", log: Callable[[str], None], *, hurried: bool = False
) -> None:
    """Send `message`; what may be better a little later is tried again.

    Args:
        section: `[notify.NAME]`.
        message: what it says.
        log: told what a program prints, and what failed before it is tried again.
        hurried: one attempt only.

    Raises:
        FleeceError: it was not taken. It may have been all the same, if the answer was lost.
    """
    from agent.cli_verify import parse_duration

    timeout_s = parse_duration(section.timeout)
    for pause_s in () if hurried else PAUSES_S:
        try:
            return await _once(section, message, timeout_s, log)
        except DeliveryError as error:
            if not error.temporary:
                raise
            log(f"{error}; it is tried again in {pause_s:.0f} s")
        await trio.sleep(pause_s)
    return await _once(section, message, timeout_s, log)


async def _once(section: "AnyNotify", message: "Message", timeout_s: float, log: Callable[[str], None]) -> None:
    try:
        if section.type == "mail":
            from agent.monitoring.mail import send_mail

            await send_mail(section, message, timeout_s, log)
        elif section.type == "webhook":
            from agent.monitoring.webhook import send_webhook

            await send_webhook(section, message, timeout_s)
        else:
            from agent.monitoring.command import run_command

            await run_command(section, message, timeout_s, log)
    except Exception as error:
        cause = first_cause(error)
        if isinstance(cause, FleeceError):
            raise cause from error
        # Its words could be anybody's: only what it is.
        raise DeliveryError(
            "send", f"a notification by {section.type}", f"unexpected: {type(cause).__name__}"
        ) from error
