"""Options of every command that limits how fast it talks to a server or a bucket."""

from typing import Annotated

import typer

RateInOption = Annotated[str | None, typer.Option("--rate-in", metavar="SIZE", help="Bytes received a second: 50M.")]
BurstInOption = Annotated[str | None, typer.Option("--burst-in", metavar="SIZE", help="Bytes at once after a pause.")]
RateOutOption = Annotated[str | None, typer.Option("--rate-out", metavar="SIZE", help="Bytes sent a second.")]
BurstOutOption = Annotated[str | None, typer.Option("--burst-out", metavar="SIZE", help="Bytes at once after a pause.")]
