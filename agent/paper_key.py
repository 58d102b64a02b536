"""A key on paper: the lines of the key file, and QR codes of them for whoever does not want to type them again."""

import base64
import html
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from core.errors import FleeceError, os_reason
from datastore.keyfile import PAPER_BEGIN, PAPER_END, KeyFile, short_fingerprint

#: Lines of a PEM file in one QR code; more make the squares too small for a cheap camera.
_LINES_PER_CODE: Final = 20
_PEM_HEADS: Final = ("-----BEGIN ENCRYPTED PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----")
_TIMEOUT_S: Final = 20.0
_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
  @page {{ margin: 15mm }}
  p {{ font-size: 12pt; font-family: monospace; white-space: pre-wrap; line-break: anywhere }}
  img {{ width: 100%; max-width: 12cm; display: block; page-break-inside: avoid; margin: auto }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class PaperKey:
    """What is to be printed."""

    title: str
    codes: tuple[str, ...]  #: texts, one QR code each; together the file

    @classmethod
    def of(cls, data: bytes, subject: str | None, *, where: str) -> Self:
        """Read a key file, or the private half of a master key.

        Raises:
            FormatError: neither.
        """
        text = data.decode(errors="replace")
        if text.lstrip().startswith(_PEM_HEADS):
            lines = text.strip().splitlines()
            groups = [lines[start : start + _LINES_PER_CODE] for start in range(0, len(lines), _LINES_PER_CODE)]
            return cls(subject or "Master key", tuple("\n".join(group) for group in groups))
        file = KeyFile.parse(data, where=where)
        name = f" {short_fingerprint(file.fingerprint)}" if file.fingerprint is not None else ""
        pretty = json.dumps(file.document(), indent=2, ensure_ascii=False)
        return cls(subject or f"Backup key{name}", (f"{PAPER_BEGIN.decode()}\n{pretty}\n{PAPER_END.decode()}",))

    def plain_text(self) -> str:
        """The text alone."""
        return "\n".join((f"Subject: {self.title}", "", *self.codes, ""))

    def text(self) -> str | None:
        """Text with QR codes of block characters; None without the program qrencode."""
        codes = self._encoded("UTF8")
        return None if codes is None else self.plain_text() + "\n" + "\n".join(code.decode() for code in codes)

    def html(self) -> str | None:
        """A page with QR codes as images; None without the program qrencode."""
        codes = self._encoded("SVG")
        if codes is None:
            return None
        body = [f"<h1>{html.escape(self.title)}</h1>"]
        for text, code in zip(self.codes, codes, strict=True):
            body.append(f"<p>{html.escape(text)}</p>")
            source = base64.b64encode(code).decode()
            body.append(f'<img alt="QR code of the text above" src="data:image/svg+xml;base64,{source}">')
        return _PAGE.format(title=html.escape(self.title), body="\n".join(body))

    def _encoded(self, kind: str) -> Sequence[bytes] | None:
        program = shutil.which("qrencode")
        if program is None:
            return None
        # The text goes through a pipe: arguments are for everybody to read.
        return [_run([program, "-t", kind, "-m", "2", "-o", "-"], text.encode()) for text in self.codes]


def _run(command: Sequence[str], data: bytes) -> bytes:
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise FleeceError("run", command[0], f"no answer in {_TIMEOUT_S:.0f} seconds") from None
    except OSError as error:
        raise FleeceError("run", command[0], os_reason(error)) from error
    if done.returncode != 0 or not done.stdout:
        why = " ".join(done.stderr[:500].decode(errors="replace").split()) or f"it ended with {done.returncode}"
        raise FleeceError("run", command[0], why)
    return done.stdout
