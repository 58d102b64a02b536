"""`fleece doctor`, `benchmark`, `completion`, `version`: the host itself."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent.invocation import Invocation, command
from core.errors import ExitCode

if TYPE_CHECKING:
    from agent.doctor import Check


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    command(
        application,
        "doctor",
        repository=False,
        examples="""
fleece doctor
fleece doctor --output json | jq '.checks[] | select(.state != "ok")'
""",
    )(doctor)
    command(application, "benchmark", repository=False, examples="fleece benchmark --output json")(benchmark)
    command(
        application,
        "completion",
        repository=False,
        examples="""
fleece completion bash > /etc/bash_completion.d/fleece
fleece completion zsh > /usr/local/share/zsh/site-functions/_fleece
fleece completion fish > ~/.config/fish/completions/fleece.fish
""",
    )(completion)
    command(application, "version", repository=False, examples="fleece version --output json")(version)


def doctor(invocation: Invocation) -> None:
    """Say what this host can do and what is missing, with the command that fixes it.

    Ends with 0 if all is well, 3 if something is missing that some of Fleece needs, 1 if the main job does not work.
    """
    from agent.doctor import State, examine

    checks = examine(invocation)
    worst = ExitCode.DONE
    if any(check.state is State.WARNING for check in checks):
        worst = ExitCode.WARNINGS
    if any(check.state is State.FAILED for check in checks):
        worst = ExitCode.FAILED
    invocation.emit({"checks": [check.to_json() for check in checks]}, lambda: _lines(checks))
    if worst is not ExitCode.DONE:
        raise typer.Exit(worst)


def _lines(checks: "list[Check]") -> list[str]:
    width = max(len(check.state.value) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state.value.ljust(width)}  {check.name}: {check.detail}")
        if check.fix and check.state.value != "ok":
            lines.append(f"{' ' * width}  -> {check.fix}")
    return lines


def benchmark(
    invocation: Invocation,
    runs: Annotated[int, typer.Option("--runs", min=1, max=1000, help="Each figure is the median of so many.")] = 5,
) -> None:
    """Measure what this machine can do: hashing, compression, encryption, checksums.

    A backup of new data cannot be quicker than these together; the report of a backup can be compared with them.
    """
    from agent.documents import table
    from datastore.primitives import measure
    from datastore.sha256 import implementation

    figures = measure(runs)
    document = {"sha256": implementation(), "primitives": [figure.to_json() for figure in figures]}

    def lines() -> list[str]:
        rows = [(figure.text, f"{figure.rate / 1e6:.0f}", "used here" if figure.used else "") for figure in figures]
        return list(table(("one thread, chunks of 4 MiB", "MB/s", ""), rows, right=(1,)))

    invocation.emit(document, lines)


def completion(
    invocation: Invocation,
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="bash|zsh|fish", help="Your shell.")],
) -> None:
    """Print the script that completes verbs and options in a shell."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # re-exported, but not said so

    script = get_completion_script(prog_name="fleece", complete_var="_FLEECE_COMPLETE", shell=shell)
    invocation.emit({"shell": shell, "script": script}, lambda: script)


def version(invocation: Invocation) -> None:
    """Print the version of Fleece and of what it is made of."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    versions = {"python": platform.python_version()}
    for package in ("fleece", "trio", "qemu.qmp", "pyfuse3", "zstandard"):
        try:
            versions[package] = version_of(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    own = versions.pop("fleece")
    invocation.emit({"version": own, "components": versions}, lambda: f"fleece {own}")
