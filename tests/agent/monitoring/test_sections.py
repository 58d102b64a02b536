"""What the configuration may say of monitoring, and what it must not."""

import pytest

from agent.monitoring.sections import check_mail_address, is_loopback, split_host_port
from core.errors import UsageError

from .conftest import config, mail, target, webhook

MAIL = 'type = "mail"\nto = "root"\n'
HOOK = 'type = "webhook"\nurl = "https://chat.example/x"\n'


def test_defaults_are_safe() -> None:
    section = config("[status]\n").status
    assert section is not None
    assert section.listen == "127.0.0.1:8017"
    assert config("").status is None
    assert config("").events is None
    assert config("").notify == {}
    assert mail().on == ["failure", "warning"]
    assert mail('smtp = "mail.example:587"').encryption == "starttls"
    assert mail('smtp = "localhost:25"').encryption == "none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[events]\n", "it goes nowhere"),
        ("[metrics]\ntextfile = '/x/fleece.txt'\n", r"end in \.prom"),
        ("[status]\nlisten = '0.0.0.0:8017'\n", "needs a token-file"),
        ("[status]\nlisten = '192.0.2.1:8017'\n", "needs a token-file"),
        ("[status]\nlisten = '8017'\n", "HOST:PORT"),
        ("[status]\nlisten = 'user@127.0.0.1:8017'\n", "HOST:PORT"),
        ("[status]\ncertificate = '/x'\n", "belong together"),
        ("[status]\nlissten = ''\n", "did you mean 'listen'"),
        (f"[notify.x]\n{MAIL}on = 'never'\n", "notify.x.on"),
        (f"[notify.x]\n{MAIL}on = []\n", "notify.x.on"),
        (f"[notify.x]\n{MAIL}form = 'a'\n", "did you mean 'from'"),
        (f"[notify.'x/y']\n{MAIL}", "letters, digits"),
        ("[notify.x]\ntype = 'pager'\n", "notify.x.type must be one of"),
        (f"[notify.x]\n{MAIL}timeout = '0s'\n", "1s to 5m"),
        (f"[notify.x]\n{MAIL}body = 'a'\ntemplate = '/x'\n", "two ways"),
        (f"[notify.x]\n{MAIL}subject = '$nobody'\n", r"\$nobody is no variable"),
        (f"[notify.x]\n{MAIL}body = 'costs 5$'\n", "followed by no name"),
        (f"[notify.x]\n{MAIL}user = 'a'\n", "needs smtp"),
        (f"[notify.x]\n{MAIL}smtp = 'h:1'\nuser = 'a'\n", "belong together"),
        (f"[notify.x]\n{MAIL}smtp = 'h:1'\ntls = 'none'\nuser = 'a'\npassword-file = '/x'\n", "over TLS only"),
        ("[notify.x]\ntype = 'mail'\nto = 'a@b, c@d'\n", "not of the form"),
        ("[notify.x]\ntype = 'mail'\nto = '-froot'\n", "not of the form"),
        (f"[notify.x]\n{HOOK}headers = {{ Host = 'x' }}\n", "not free to choose"),
        (f'[notify.x]\n{HOOK}headers = {{ X = "a\\r\\nY: b" }}\n', "not one line of ASCII"),
        (f"[notify.x]\n{HOOK}headers = {{ X = '$secret' }}\n", r"\$secret needs secret-file"),
        (f"[notify.x]\n{HOOK}secret-file = '/x'\n", r"secret-file needs \$secret"),
        (f"[notify.x]\n{HOOK}body = '{{'\n", "does not give JSON"),
        (f"[notify.x]\n{HOOK}body = '{{\"a\": $job}}'\n", "does not give JSON"),
        ("[notify.x]\ntype = 'webhook'\nurl = 'ftp://x'\n", "https://HOST"),
        ("[notify.x]\ntype = 'webhook'\nurl = 'https://u:p@h/'\n", "user or password"),
        ("[notify.x]\ntype = 'webhook'\nurl = 'https://h/$job'\n", r"only \$secret"),
        ("[notify.x]\ntype = 'webhook'\nurl = 'https://$secret/'\nsecret-file = '/x'\n", "behind the host"),
        ("[notify.x]\ntype = 'webhook'\nurl = 'http://h/$secret'\nsecret-file = '/x'\n", "over plain http"),
        ("[notify.x]\ntype = 'command'\ncommand = 'ls'\n", "begins with a /"),
    ],
)
def test_what_makes_no_sense_or_is_not_safe_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        config(text)
    assert raised.value.where.startswith("f:")
    assert "u:p" not in str(raised.value)


def test_what_makes_sense_is_taken() -> None:
    assert webhook('url = "http://127.0.0.1:1/$secret"\nsecret-file = "/x"').secret_file is not None
    assert target('type = "command"\ncommand = ["/bin/true", "-v"]\non = "always"\njobs = "n*"').jobs == ["n*"]
    for text in ("root", "a.b+c@example.org"):
        check_mail_address(text)
    assert split_host_port("[::1]:80") == ("::1", 80)
    assert [is_loopback(host) for host in ("localhost", "127.1.2.3", "::1", "example.org", "10.0.0.1")] == [
        True, True, True, False, False,
    ]  # fmt: skip
