"""The command `fleece`: the tree of its verbs, and the one place where errors become text and exit codes.

Verbs live in the `cli_*` modules, which import nothing heavy at their top, so that `fleece --help` is quick.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import typer

from agent import (
    cli_agent,
    cli_backup,
    cli_datastore,
    cli_gc,
    cli_host,
    cli_index,
    cli_job,
    cli_key,
    cli_log,
    cli_login,
    cli_look,
    cli_monitoring,
    cli_mount,
    cli_nbd,
    cli_notes,
    cli_provider,
    cli_prune,
    cli_remote,
    cli_restore,
    cli_s3,
    cli_serve,
    cli_serve_nbd,
    cli_snapshots,
    cli_sync,
    cli_task,
    cli_test_boot,
    cli_users,
    cli_verify,
    cli_vm,
    cli_vzdump_hook,
)
from agent.invocation import flush_stdout, general_options, silence_stdout, to_stderr
from core.errors import ExitCode, FleeceError, TargetError, os_reason

#: How long a thread keeps the GIL while others want it; Python's 5 ms are half of what a batch of work takes here.
_SWITCH_S: Final = 0.001
_COMPLETE_VARIABLE: Final = "_FLEECE_COMPLETE"

_HELP: Final = """Backs up QEMU/KVM virtual machines and files into datastores that Proxmox Backup Server reads too.

A repository is a datastore that 'fleece datastore create' made, in a folder or an S3 bucket, or one on a Proxmox Backup
Server or another Fleece. A snapshot is named type/id/time, for example vm/100/2026-01-02T03:04:05Z, or
vm/100/latest."""

_EXAMPLES: Final = """\b
First steps:
  fleece doctor                                        what this host can do
  fleece datastore create /backup/main                 a datastore in a folder
  export FLEECE_REPOSITORY=/backup/main                used by all that follows
  fleece backup disk.img:/var/lib/vm/disk.raw --backup-id web
  fleece vm backup --qmp /run/web.qmp --id web         a running virtual machine
  fleece list
  fleece mount /mnt/backup                             browse every snapshot
  fleece restore vm/web/latest drive-disk0.img /var/lib/vm/new.raw

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with warnings.
'fleece VERB --help' has examples for each verb."""


def build() -> typer.Typer:
    """The whole tree of verbs."""
    application = typer.Typer(
        name="fleece",
        help=_HELP,
        epilog=_EXAMPLES,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    general_options(application)
    cli_vm.add_to(application)
    cli_backup.add_to(application)
    cli_log.add_to(application)
    cli_snapshots.add_to(application)
    cli_verify.add_to(application)
    cli_gc.add_to(application)
    cli_prune.add_to(application)
    cli_notes.add_to(application)
    cli_restore.add_to(application)
    cli_look.add_to(application)
    cli_index.add_to(application)
    cli_mount.add_to(application)
    cli_nbd.add_to(application)
    cli_serve_nbd.add_to(application)
    cli_test_boot.add_to(application)
    cli_datastore.add_to(application)
    cli_s3.add_to(application)
    cli_serve.add_to(application)
    cli_users.add_to(application)
    cli_task.add_to(application)
    cli_key.add_to(application)
    cli_login.add_to(application)
    cli_remote.add_to(application)
    cli_sync.add_to(application)
    cli_job.add_to(application)
    cli_agent.add_to(application)
    cli_monitoring.add_to(application)
    cli_vzdump_hook.add_to(application)
    cli_provider.add_to(application)
    cli_host.add_to(application)
    return application


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for JSON; looked up by hand because it may be what cannot be parsed."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--output", "--output-format"):
            value = value if equals else "".join(arguments[position + 1 : position + 2])
            return value in ("json", "json-pretty")
    return False


def _complain(error: FleeceError, *, as_json: bool) -> None:
    """Write `error` to standard error, as JSON or as text; notes tell what went wrong after it."""
    notes = getattr(error, "__notes__", [])
    if as_json:
        hint = "; ".join([*([error.hint] if error.hint else []), *notes])
        fields = {"what": error.what, "where": error.where, "why": error.why, "hint": hint}
        to_stderr(json.dumps({"error": fields}, ensure_ascii=False))
        return
    where = f" {error.where}" if error.where else ""
    to_stderr(f"Error: cannot {error.what}{where}: {error.why}")
    if error.hint:
        to_stderr(f"Hint: {error.hint}")
    for note in notes:
        to_stderr(f"Note: {note}")


def _usage_error(error: Exception) -> FleeceError:
    """What typer found wrong with the command line, in our form."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "fleece"
    message = str(getattr(error, "format_message", lambda: str(error))()).strip()
    return FleeceError("understand the command line", f"'{path}'", message.rstrip("."), f"'{path} --help' explains it")


def _unexpected(error: BaseException, *, as_json: bool, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    name = type(error).__name__
    why = f"{name}: {error}" if str(error) else name
    hint = "" if debug else "please report this; run it again with --debug to see where in the program it arose"
    _complain(FleeceError("go on", "", f"something unexpected happened ({why})", hint), as_json=as_json)


def _was_printing(error: OSError) -> bool:
    """Whether `error` arose where typer prints help, the only text that does not go through `Invocation`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "echo"


def run(arguments: Sequence[str]) -> int:
    """Run the command with `arguments` (without the program's name) and return the exit code."""
    as_json, debug = _wants_json(arguments), "--debug" in arguments
    if os.environ.get(_COMPLETE_VARIABLE):
        from typer.completion import completion_init  # type: ignore[attr-defined]  # re-exported, but not said so

        completion_init()
    try:
        command = typer.main.get_command(build())
        result = command.main(
            args=list(arguments), prog_name="fleece", complete_var=_COMPLETE_VARIABLE, standalone_mode=False
        )
        flush_stdout()
    except FleeceError as error:
        if debug:
            import traceback

            traceback.print_exception(error)
        _complain(error, as_json=as_json)
        return error.exit_code
    except BrokenPipeError:
        silence_stdout()
        return ExitCode.FAILED
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            to_stderr(error.format_message())
        else:
            _complain(_usage_error(error), as_json=as_json)
        return ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        _complain(FleeceError("go on", "", "interrupted"), as_json=as_json)
        return ExitCode.FAILED
    except Exception as error:
        if isinstance(error, OSError) and _was_printing(error):
            silence_stdout()
            _complain(TargetError("write to", "standard output", os_reason(error)), as_json=as_json)
            return ExitCode.FAILED
        _unexpected(error, as_json=as_json, debug=debug)
        return ExitCode.FAILED
    return int(result) if isinstance(result, int) else ExitCode.DONE


def _fill_closed_streams() -> None:
    """Keep what is opened from now on from getting the number of a standard stream that the caller closed.

    `sys.stdout` stays None then: what is printed is lost, and nothing can be written to its descriptor by mistake.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - for as long as the process runs
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def main() -> None:
    """The console script."""
    _fill_closed_streams()
    sys.setswitchinterval(_SWITCH_S)
    raise SystemExit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
