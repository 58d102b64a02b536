"""`fleece key`: make, keep, show, and recover encryption keys; names and options are those of proxmox-backup-client."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from agent.invocation import Invocation, command, to_stderr
from core.errors import FleeceError, UsageError

if TYPE_CHECKING:
    from datastore.codec import CryptKey
    from datastore.keyfile import KeyFile

KeyPath = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The key file; else the one of backups.")]
KdfOption = Annotated[
    Literal["scrypt", "none", "pbkdf2"],
    typer.Option("--kdf", help="How the file is protected: by a passphrase (scrypt) or not at all (none)."),
]
HintOption = Annotated[
    str | None,
    typer.Option("--hint", metavar="TEXT", help="Helps to remember the passphrase; anybody can read it."),
]

_LOST: Final = (
    "Keep a copy of this key where it survives the loss of this host (see 'fleece key paperkey'): "
    "without it, and without a master key, all backups made with it are lost. Nobody can recover them."
)
_LOST_MASTER: Final = (
    "Keep the private half and its passphrase away from this host, where they survive its loss: they open every backup "
    "made with the public half, and without them those are lost with their keys."
)


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(
        no_args_is_help=True, help="Encryption keys: make, show, print and recover them.", rich_markup_mode=None
    )
    application.add_typer(group, name="key")
    for name, function, examples in (
        (
            "create",
            create,
            """
fleece key create                                     the default key, used by every backup from then on
fleece key create /etc/fleece/backup.key --hint 'the red notebook'
fleece key create /etc/fleece/backup.key --kdf none   without a passphrase, for unattended backups
""",
        ),
        (
            "change-passphrase",
            change_passphrase,
            """
fleece key change-passphrase
fleece key change-passphrase /etc/fleece/backup.key --hint 'the blue notebook'
fleece key change-passphrase /etc/fleece/backup.key --kdf none
""",
        ),
        ("show", show, "fleece key show\nfleece key show /etc/fleece/backup.key --output-format json"),
        (
            "create-master-key",
            create_master_key,
            """
fleece key create-master-key                          master-public.pem and master-private.pem, in this folder
fleece key create-master-key && fleece key import-master-pubkey master-public.pem
""",
        ),
        ("import-master-pubkey", import_master_pubkey, "fleece key import-master-pubkey master-public.pem"),
        (
            "show-master-pubkey",
            show_master_pubkey,
            "fleece key show-master-pubkey\nfleece key show-master-pubkey master-public.pem --output-format json",
        ),
        (
            "import-with-master-key",
            import_with_master_key,
            """
fleece restore vm/100/latest rsa-encrypted.key rsa-encrypted.key
fleece key import-with-master-key new.key --master-keyfile master-private.pem --encrypted-keyfile rsa-encrypted.key
fleece restore vm/100/latest drive-scsi0.img disk.raw --keyfile new.key
""",
        ),
    ):
        command(group, name, repository=False, examples=examples)(function)
    command(
        group,
        "paperkey",
        repository=False,
        output=False,
        examples="""
fleece key paperkey --output-format text | lpr
fleece key paperkey /etc/fleece/backup.key --subject 'host db1' > key.html
""",
    )(paperkey)


def create(
    invocation: Invocation,
    path: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where it is written; else the place of the default key.")
    ] = None,
    kdf: KdfOption = "scrypt",
    hint: HintOption = None,
) -> None:
    """Make a new encryption key. Whoever loses it loses every backup made with it.

    The passphrase is asked for at the terminal, or taken from PBS_ENCRYPTION_PASSWORD (_FD, _FILE, _CMD). An existing
    file is never overwritten.
    """
    import os

    from agent.keys import KEY_NAME, new_default_file
    from datastore.codec import KEY_SIZE, CryptKey

    _check_hint(kdf, hint)
    target = path or new_default_file(KEY_NAME)
    note = _what_it_changes(invocation) if path is None else ""
    _refuse_existing(target, "create the key")
    file = _protected(CryptKey.from_raw(os.urandom(KEY_SIZE)), kdf, hint)
    _store_new(invocation, target, file, "create the key", "created", note)


def change_passphrase(
    invocation: Invocation, path: KeyPath = None, kdf: KdfOption = "scrypt", hint: HintOption = None
) -> None:
    """Protect a key file with another passphrase, or with none. The key stays the same.

    The old passphrase comes from PBS_ENCRYPTION_PASSWORD (_FD, _FILE, _CMD), the new one from
    FLEECE_NEW_ENCRYPTION_PASSWORD (_FD, _FILE, _CMD), and each else from the terminal. Other copies of the file keep
    the old one.
    """
    from agent.keys import NEW_PASSPHRASE_VARIABLE, unlock
    from datastore.keyfile import read_key_file
    from datastore.private_files import replace

    _check_hint(kdf, hint)
    target = _existing_key(invocation, path)
    old = read_key_file(target)
    key = unlock(old, str(target))
    file = _protected(key, kdf, hint, variable=NEW_PASSPHRASE_VARIABLE, old=old)
    replace(target, file.encode(), what="change the passphrase of")
    _warn_if_exposed(invocation, target)
    invocation.emit(_document(file, target), lambda: f"{target}: changed")


def show(invocation: Invocation, path: KeyPath = None) -> None:
    """Show what can be known of a key file without its passphrase; never the key."""
    import dataclasses

    from datastore.keyfile import read_key_file

    target = _existing_key(invocation, path)
    file = read_key_file(target)
    if file.kdf is None:
        # Its fingerprint has to be true; old files have none.
        file = dataclasses.replace(file, fingerprint=file.unlock(None, where=str(target)).fingerprint)
    invocation.emit(_document(file, target), lambda: _lines(file, target))


def create_master_key(
    invocation: Invocation,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where both files are written; else this folder.")
    ] = Path(),
) -> None:
    """Make a master key: a pair of RSA keys whose private half opens every backup made with the public half.

    The passphrase of the private half is asked for at the terminal, or taken from FLEECE_MASTER_KEY_PASSWORD (_FD,
    _FILE, _CMD). Existing files are never overwritten.
    """
    from agent.keys import MASTER_PASSPHRASE_VARIABLE, MASTER_PUBLIC_NAME, new_passphrase
    from datastore.master_key import create_pair
    from datastore.private_files import write_new

    private_path, public_path = folder / "master-private.pem", folder / MASTER_PUBLIC_NAME
    for path in (private_path, public_path):
        _refuse_existing(path, "create the master key")
    private, public = create_pair(new_passphrase(MASTER_PASSPHRASE_VARIABLE, "Passphrase of the master key: "))
    write_new(private_path, private, what="create the master key")
    try:
        write_new(public_path, public, what="create the master key", mode=0o644)
    except BaseException:
        private_path.unlink()  # nothing was encrypted for it yet, and it would be in the way of the next try
        raise
    _warn_if_exposed(invocation, private_path)
    document = {"private": str(private_path), "public": str(public_path), "warning": _LOST_MASTER}
    invocation.emit(document, lambda: [f"private master key: {private_path}", f"public master key: {public_path}"])
    if not invocation.is_json:
        to_stderr(f"WARNING: {_LOST_MASTER}")
    invocation.say(f"'fleece key import-master-pubkey {public_path}' makes backups use it.")


def import_master_pubkey(
    invocation: Invocation, path: Annotated[Path, typer.Argument(metavar="FILE", help="The public half, a PEM file.")]
) -> None:
    """Make a public master key the default one: every encrypted backup then holds its own key, encrypted with it."""
    from agent.keys import MASTER_PUBLIC_NAME, new_default_file
    from datastore.codec import KEY_SIZE, CryptKey
    from datastore.master_key import MasterPublicKey
    from datastore.private_files import read_small, write_new

    pem = read_small(path, what="read the master public key")
    # Too short a one would fail every backup.
    MasterPublicKey.parse(pem, where=str(path)).wrap(CryptKey.from_raw(bytes(KEY_SIZE)))
    target = new_default_file(MASTER_PUBLIC_NAME)
    if not (target.exists() and read_small(target, what="read the master public key") == pem):
        write_new(target, pem, what="import the master public key as", mode=0o644)
    invocation.emit({"path": str(target)}, lambda: f"imported as {target}")


def show_master_pubkey(invocation: Invocation, path: KeyPath = None) -> None:
    """Show a public master key."""
    from agent.keys import MASTER_PUBLIC_NAME, find_existing
    from datastore.master_key import MasterPublicKey
    from datastore.private_files import read_small

    configured = None if path is not None else invocation.key_options().default_master
    target = find_existing(path, configured, MASTER_PUBLIC_NAME)
    key = MasterPublicKey.parse(read_small(target, what="read the master public key"), where=str(target))
    document = {
        "path": str(target),
        "modulus": f"{key.modulus:0{2 * key.size}X}",
        "exponent": str(key.exponent),
        "length": key.size,
    }
    invocation.emit(document, lambda: [f"{name}: {value}" for name, value in document.items()])


def import_with_master_key(
    invocation: Invocation,
    master_keyfile: Annotated[
        Path, typer.Option("--master-keyfile", metavar="FILE", help="The private half, master-private.pem.")
    ],
    encrypted_keyfile: Annotated[
        Path, typer.Option("--encrypted-keyfile", metavar="FILE", help="rsa-encrypted.key, restored from a snapshot.")
    ],
    path: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Where it is written; else the place of the default key.")
    ] = None,
    kdf: KdfOption = "scrypt",
    hint: HintOption = None,
) -> None:
    """Recover the encryption key of a backup with the private master key.

    The master key's passphrase is asked for at the terminal, or taken from FLEECE_MASTER_KEY_PASSWORD (_FD, _FILE,
    _CMD), the one for the new key file from PBS_ENCRYPTION_PASSWORD (_FD, _FILE, _CMD).
    """
    from agent.keys import KEY_NAME, MASTER_PASSPHRASE_VARIABLE, new_default_file, passphrase
    from datastore.master_key import MAX_WRAPPED_SIZE, needs_passphrase, unwrap_key
    from datastore.private_files import read_small

    _check_hint(kdf, hint)
    target = path or new_default_file(KEY_NAME)
    note = _what_it_changes(invocation) if path is None else ""
    _refuse_existing(target, "import the key as")
    private = read_small(master_keyfile, what="read the master private key")
    wrapped = read_small(encrypted_keyfile, what="read the encrypted key", limit=MAX_WRAPPED_SIZE)
    secret = None
    if needs_passphrase(private):
        secret = passphrase(
            MASTER_PASSPHRASE_VARIABLE, "Passphrase of the master key: ", "read the master private key",
            str(master_keyfile),
        )  # fmt: skip
    found = unwrap_key(wrapped, private, secret, where=str(encrypted_keyfile), master=str(master_keyfile))
    key = found.unlock(None, where=str(encrypted_keyfile))
    _store_new(invocation, target, _protected(key, kdf, hint, old=found), "import the key as", "imported", note)


def paperkey(
    invocation: Invocation,
    path: KeyPath = None,
    output_format: Annotated[
        Literal["html", "text"], typer.Option("--output-format", "--output", help="A page for a browser, or text.")
    ] = "html",
    subject: Annotated[str | None, typer.Option("--subject", metavar="TEXT", help="A heading for the page.")] = None,
) -> None:
    """Write a key in a form to be printed, with QR codes if the program qrencode is there; else as text.

    Also the private half of a master key. A key without a passphrase is on the paper for everybody to read.
    """
    from agent.paper_key import PaperKey
    from datastore.private_files import read_small

    target = _existing_key(invocation, path)
    paper = PaperKey.of(read_small(target, what="read the key"), subject, where=str(target))
    page = paper.html() if output_format == "html" else paper.text()
    if page is None:
        to_stderr("Note: the program qrencode is not installed: no QR codes, text only")
        page = paper.plain_text()
    print(page, end="")


def _existing_key(invocation: Invocation, path: Path | None) -> Path:
    from agent.keys import KEY_NAME, find_existing

    return find_existing(path, None if path is not None else invocation.key_options().default_keyfile, KEY_NAME)


def _what_it_changes(invocation: Invocation) -> str:
    """What a new default key means for a host that has a key already; empty if it has none."""
    from agent.keys import KEY_NAME, default_file

    if configured := invocation.key_options().default_keyfile:
        return f"backups go on to use {configured}, which the configuration names"
    if other := default_file(KEY_NAME):
        return f"backups used the key {other} until now, the new one from now on: keep both"
    return ""


def _check_hint(kdf: str, hint: str | None) -> None:
    if kdf == "none" and hint is not None:
        raise UsageError("use", "--hint", "with --kdf none there is no passphrase to remember")


def _refuse_existing(path: Path, what: str) -> None:
    """Before a passphrase is asked for; `write_new` looks again."""
    import os

    if os.path.lexists(path):
        raise FleeceError(
            what, str(path), "there is a file already, and it may be the only one with its key",
            "name another file, or move that one away",
        )  # fmt: skip


def _protected(
    key: "CryptKey",
    kdf: Literal["scrypt", "none", "pbkdf2"],
    hint: str | None,
    *,
    variable: str | None = None,
    old: "KeyFile | None" = None,
) -> "KeyFile":
    """A file for `key`, under a new passphrase unless `kdf` is none."""
    from agent.keys import PASSPHRASE_VARIABLE, new_passphrase
    from datastore.keyfile import KeyFile

    secret = None if kdf == "none" else new_passphrase(variable or PASSPHRASE_VARIABLE, "New passphrase: ")
    return KeyFile.make(key, secret, kdf=kdf, hint=hint, created=old.created if old is not None else None)


def _store_new(invocation: Invocation, path: Path, file: "KeyFile", what: str, done: str, note: str) -> None:
    from datastore.private_files import write_new

    write_new(path, file.encode(), what=what)
    if note:
        invocation.warnings.append(note)
    # In JSON too, and even if quiet: there is no second chance to say it.
    document = {**_document(file, path), "warning": _LOST}
    _warn_if_exposed(invocation, path)
    invocation.emit(document, lambda: [f"{done}: {path}", *_lines(file, path)[1:]])
    if not invocation.is_json:
        to_stderr(f"WARNING: {_LOST}")


def _warn_if_exposed(invocation: Invocation, path: Path) -> None:
    from datastore.private_files import readable_by_others

    if readable_by_others(path):
        invocation.warnings.append(f"others can read {path}: its file system keeps no modes")


def _document(file: "KeyFile", path: Path) -> dict[str, Any]:
    """What may be known of a key file, with PBS's names."""
    from datastore.codec import format_fingerprint

    document: dict[str, Any] = {
        "path": str(path),
        "kdf": "none" if file.kdf is None else file.kdf.name,
        "created": int(file.created.timestamp()),
        "modified": int(file.modified.timestamp()),
    }
    if file.fingerprint is not None:
        document["fingerprint"] = format_fingerprint(file.fingerprint)
    if file.hint is not None:
        document["hint"] = file.hint
    return document


def _lines(file: "KeyFile", path: Path) -> list[str]:
    from datastore.codec import format_fingerprint
    from datastore.keyfile import short_fingerprint

    lines = [str(path)]
    if file.fingerprint is not None:
        lines.append(f"  key: {short_fingerprint(file.fingerprint)}")
        lines.append(f"  fingerprint: {format_fingerprint(file.fingerprint)}")
    lines.append(f"  protected by: {'nothing' if file.kdf is None else f'a passphrase ({file.kdf.name})'}")
    if file.hint is not None:
        # A foreign file may try to talk to the terminal.
        lines.append(f"  hint: {file.hint if file.hint.isprintable() else ascii(file.hint)}")
    lines.append(f"  created: {file.created.isoformat(timespec='seconds')}")
    lines.append(f"  modified: {file.modified.isoformat(timespec='seconds')}")
    return lines
