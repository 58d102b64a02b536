"""`fleece agent`: the service that runs jobs when they are due."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command, to_stderr

if TYPE_CHECKING:
    from agent.config import Config
    from agent.host_agent import ChildRunner


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "agent",
        repository=False,
        output=False,
        examples="""
systemctl enable --now fleece-agent                      as the service it is made for
fleece agent                                             in a terminal; Ctrl-C ends it
systemctl reload fleece-agent                            after a change of fleece.toml
""",
    )(agent)


def agent(
    invocation: Invocation,
    stop_timeout: Annotated[
        float, typer.Option("--stop-timeout", metavar="SECONDS", min=1, help="How long jobs may clean up at the end.")
    ] = 300.0,
) -> None:
    """Run the jobs of the configuration when they are due, until SIGTERM or SIGINT.

    A time that was missed is made up for, once, unless the job says catch-up = false. SIGHUP reads the configuration
    again. With [status] in it there is a page at http://127.0.0.1:8017/ that shows what is backed up, with metrics
    beside it. Jobs that run when the agent ends clean up first; what was cut off runs again at the next start.
    """
    import trio

    from agent.host_agent import ChildRunner, HostAgent, run_until_signal
    from agent.monitoring.watching import AgentWatch
    from agent.places import private_run_dir, state_dir

    private_run_dir()
    say = (lambda text: None) if invocation.quiet else to_stderr
    runner = ChildRunner(stop_timeout_s=stop_timeout)
    watch = AgentWatch(state_dir(), invocation.registry, say, runner.refresh)
    trio.run(run_until_signal, HostAgent(loader(invocation, runner), runner, state_dir(), say, watch=watch))


def loader(invocation: Invocation, runner: "ChildRunner") -> "Callable[[], Config]":
    """What reads the configuration each time, and hands it to `runner` if it is valid."""
    from agent.config import parse_config, read_config

    def load() -> "Config":
        path, must_exist = invocation.config_place()
        # That it is gone does not mean that there are no jobs any more.
        text = read_config(path, must_exist=must_exist or bool(runner.config))
        config = parse_config(text, str(path))
        runner.config = text
        return config

    return load
