"""A secret that a command is given: in a file, by a descriptor, in the environment, or at a terminal."""

from pathlib import Path

from core.errors import UsageError


def given_secret(
    what: str, prompt: str, variable: str, file: Path | None, descriptor: int | None, *, option: str, needed: bool
) -> str | None:
    """The secret; None if there is none and none is needed.

    Args:
        what: for messages: "the secret key".
        prompt: the question at a terminal.
        variable: environment variable; `_FILE`, `_FD` and `_CMD` behind it count too.
        file: its first line is the secret.
        descriptor: read in place of a file.
        option: name of both options without their ending: `--secret` of `--secret-file` and `--secret-fd`.
        needed: ask for it.

    Raises:
        UsageError: it is given twice, or it is needed and nobody can be asked.
        FleeceError: it cannot be read.
    """
    from agent.keys import ask, can_ask, passphrase_from_environment, read_descriptor
    from agent.secrets import MAX_SECRET, check_secret
    from datastore.private_files import read_small

    if file is not None and descriptor is not None:
        raise UsageError("use", f"{option}-file and {option}-fd", "one of them is enough")
    if file is not None:
        found: bytes | None = read_small(file, what=f"read {what} from", limit=MAX_SECRET + 2)
    elif descriptor is not None:
        found = read_descriptor(descriptor, f"{option}-fd", MAX_SECRET + 2)
    elif not needed:
        return None
    else:
        found = passphrase_from_environment(variable)
        if found is None and can_ask():
            found = ask(prompt)
        if found is None:
            ways = f"give {option}-file or {option}-fd, or set {variable}, {variable}_FILE, _FD or _CMD"
            raise UsageError("get", what, "there is no terminal to ask for it", ways)
    assert found is not None
    try:
        return check_secret(found.split(b"\n", 1)[0].removesuffix(b"\r").decode())
    except UnicodeDecodeError:
        raise UsageError("use", what, "it is no text") from None
