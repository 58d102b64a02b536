import json
import os
import time
from pathlib import Path

import pytest
import trio

from hypervisor.cmdline import COMMAND_LINE_NAME, MASK, command_line, masked
from hypervisor.unix_socket import Peer, process_start_time
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu

S = "S3cr3t"  # the word that must not be left anywhere


@pytest.mark.parametrize(
    "arguments",
    [
        ["-object", f"secret,id=sec0,data={S}"],
        ["--object", f"secret,id=sec0,data={S},format=raw"],
        ["-object", f"secret,data=a,,{S},id=sec0"],
        ["-object", f"secret,data={S},,{S},,,id=sec0"],
        ["-object", f'{{"qom-type": "secret", "id": "sec0", "data": "{S}"}}'],
        ["-object", f'  {{"qom-type":"secret","id":"sec0","data":"{S}"}}'],
        ["-set", f"object.sec0.data={S}"],
        ["-global", f"some-device.password={S}"],
        ["-spice", f"port=5900,password={S},addr=127.0.0.1"],
        ["-vnc", f":1,password={S}"],
        ["-iscsi", f"user=me,password={S}"],
        ["-drive", f"file.driver=ssh,file.password={S},file.host=h,if=virtio"],
        ["-drive", f"file=iscsi://me%{S}@host/iqn.x/0,format=raw"],
        ["-drive", f"file=https://me:{S}@host:443/image.raw,format=raw"],
        ["-drive", f"file=ftp://me:p@{S}@host/image.raw"],
        ["-drive", f"file=rbd:pool/image:id=admin:key={S}==:auth_supported=cephx,format=raw"],
        ["-drive", f"file=rbd:pool/image:key=AB\\:{S}:mon_host=a\\:6789"],
        ["-drive", f'file=json:{{"driver":"ssh",,"password":"{S}"}},if=none'],
        ["-drive", f'file=json:{{"driver":"raw",,"file":{{"driver":"https",,"password":"{S}"}}}},if=none'],
        ["-blockdev", f'{{"driver":"https","url":"https://me:{S}@host/x","node-name":"n"}}'],
        ["-blockdev", f'{{"driver":"raw","file":{{"driver":"curl","cookie":"a={S}"}}}}'],
        ["-blockdev", f'{{"driver":"raw","file":"json:{{\\"driver\\":\\"ssh\\",\\"password\\":\\"{S}\\"}}"}}'],
        ["-blockdev", f'{{"driver":"x","passwords":["{S}","{S}"],"secret":"{S}","Key":"{S}"}}'],
        ["-blockdev", f'{{"driver":"x","password":"{S}"'],  # not quite JSON
        ["-blockdev", f"driver=https,cookie=a={S},url=https://host/x"],
        ["-netdev", f"l2tpv3,id=n,txcookie={S},rxcookie={S}"],
        ["-fw_cfg", f"name=opt/io.systemd.credentials/x,string={S}"],
        ["-fw_cfg", f'name=opt/com.coreos/config,string={{"passwd":,,"{S}"}}'],
        ["-smbios", f"type=11,value=io.systemd.credential:x={S},,{S}"],
        ["-smbios", f"type=11,value=io.systemd.credential.binary:x={S}"],
        ["-append", f"root=/dev/vda password={S} quiet"],
        ["-append", f"rd.luks.key={S} a,b"],
        ["-append", f"-- key={S}"],
        ["-append", f"systemd.set_credential=x:{S}"],
        ["-incoming", f"https://me:{S}@host/x"],
        [f"-odd=1,password={S}"],
        ["-blockdev", "[" * 100_000 + f'"password": "{S}"'],
    ],
)
def test_a_secret_is_masked_in_every_form(arguments: list[str]) -> None:
    result = masked(["qemu-system-x86_64", *arguments, "-S"])
    assert S not in json.dumps(result)
    assert any(MASK in argument for argument in result)
    assert (result[0], result[-1], len(result)) == ("qemu-system-x86_64", "-S", len(arguments) + 2)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (f"secret,id=sec0,data=a,,{S},format=raw", "secret,id=sec0,data=***,format=raw"),
        (f"file=a,,b.raw,password={S},if=virtio", "file=a,,b.raw,password=***,if=virtio"),
        (f"file=https://me:{S}@host:443/x,format=raw", "file=https://me:***@host:443/x,format=raw"),
        (
            f'{{"driver":"raw","password":"{S}","file":{{"filename":"/a"}}}}',
            '{"driver": "raw", "password": "***", "file": {"filename": "/a"}}',
        ),
    ],
)
def test_what_stands_beside_a_secret_stays(argument: str, expected: str) -> None:
    assert masked(["-x", argument]) == ["-x", expected]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-drive", "file=/a,,b.qcow2,if=none,id=d0,,"],
        ["-drive", "file.driver=qcow2,encrypt.format=luks,encrypt.key-secret=sec0"],
        ["-blockdev", '{"driver":"luks",  "key-secret": "sec0", "file": {"driver": "nbd", "server": {"data": {}}}}'],
        ["-spice", "port=1,password-secret=sec0"],
        ["-object", "secret,id=sec1,keyid=sec0,file=/run/sec1"],
        ["-vnc", "[::1]:1,tls-creds=t0,password"],
        ["-drive", "file=nbd://[::1]:10809/disk,format=raw"],
        ["-drive", "file=ssh://host:22/a@b.raw"],
        ["-append", "console=ttyS0,115200 root=UUID=1  quiet"],
        ["-name", "guest=vm,debug-threads=on", "-S", "-m", "1024", "-uuid", "-", "-kernel", "/boot/vm linuz"],
        ["-device", '{"driver":"virtio-blk-pci","drive":"n0","id":"disk0"}'],
        ["", ",", "=", "json:", "{", "[]"],
    ],
)
def test_what_holds_no_secret_comes_back_as_it_was(arguments: list[str]) -> None:
    assert masked(arguments) == arguments


async def test_the_blob_is_the_command_line_of_the_process_behind_the_socket(qemu: QemuBinary) -> None:
    secret = ["-object", f"secret,id=sec0,data={S}", "-name", "müller, the second"]
    async with RunningQemu.start(qemu, [], extra=[*secret[:3], "müller,,the second"]) as vm:
        blob = await command_line(Peer(vm.pid, 0, 0, process_start_time(vm.pid)))
        assert blob is not None
        arguments = json.loads(blob)
        assert Path(arguments[0]).name == "qemu-system-x86_64"
        assert "secret,id=sec0,data=***" in arguments
        assert "müller,,the second" in arguments
        assert f"unix:{vm.qmp},server=on,wait=off" in arguments
        assert S.encode() not in blob
    assert COMMAND_LINE_NAME == "qemu-command.json"


@pytest.mark.parametrize("part", ["a", "a:", "x://", "x://a:", ":key=", '"key":"', '{"password'])
def test_a_long_argument_takes_no_long_time(part: str) -> None:
    long = part * (131_072 // len(part))  # as long as the kernel allows
    began = time.process_time()
    masked(["-x", long, "-x", "{" + long])
    assert time.process_time() - began < 5  # 0.2 s on an idle machine


async def test_no_blob_for_a_process_that_is_gone_or_another_one() -> None:
    process = await trio.lowlevel.open_process(["sleep", "60"])
    pid, started = process.pid, process_start_time(process.pid)
    process.kill()
    await process.wait()
    assert await command_line(Peer(pid, 0, 0, started)) is None
    assert await command_line(Peer(os.getpid(), 0, 0, 1)) is None  # a pid that was given out again
