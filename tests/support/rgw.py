"""A real S3 gateway: Ceph's monitor, one OSD in memory and RADOS gateway on loopback, from Debian's packages.

Nothing is installed: the packages are unpacked in `.cache/ceph` (260 MB). It is ready in 7 s, and all of it ends with
the block, with the process that runs it however that ends, and at the latest after its lifetime.

`python -m tests.support.rgw` runs one until it is interrupted, and prints how to reach it.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from datastore.s3.endpoint import Endpoint
from datastore.s3.signer import EMPTY_SHA256, Signer, format_date
from tests.support.apt import AptRoot, codename
from tests.support.cache import Unavailable, cached, once
from tests.support.certificates import Certificate, make_certificate

ACCESS_KEY: Final = "AKIAFLEECERGW"
SECRET: Final = "fleece/gateway+SECRET"
REGION: Final = "default"
_PACKAGES: Final = ("ceph-mon", "ceph-osd", "radosgw")
#: Seconds after which each process is ended whatever it is doing.
LIFETIME_S: Final = 3600
#: Runs a program until it ends, its lifetime is over, or standard input does: that is a pipe which this process holds.
_LEASH: Final = """
exec 3<&0
timeout --foreground -k 5 "$0" "$@" </dev/null 3<&- & program=$!
{ read -r _ <&3; kill -TERM $program; } & watcher=$!
exec 3<&-
wait $program; code=$?
kill $watcher 2>/dev/null
exit $code
"""
#: Seconds for the start on a busy machine.
_PATIENCE_S: Final = 120
_CONF: Final = """[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}/0
public_addr = 127.0.0.1
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
# The gateway wants encryption by default, which needs authentication.
ms_mon_client_mode = crc
ms_mon_service_mode = crc
ms_mon_cluster_mode = crc
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
log_to_stderr = false
err_to_stderr = false
crash_dir = {folder}/crash
plugin_dir = {libraries}/ceph
erasure_code_dir = {libraries}/ceph/erasure-code
osd_class_dir = {libraries}/rados-classes
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 2000
mon_data = {folder}/mon
mon_data_avail_crit = 0
mon_cluster_log_file = {folder}/cluster.log
mon_osd_crush_smoke_test = false
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory}
keyring = {folder}/keyring
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{rgw_port} ssl_endpoint=127.0.0.1:{tls_port} ssl_certificate={folder}/tls.pem
"""


@once
def ceph() -> Path:
    """The folder with Ceph's programs, fetched when it is asked for the first time.

    Raises:
        Unavailable: this is no Debian, or its packages cannot be had.
    """
    release = codename()
    if not release:
        raise Unavailable("no Ceph gateway to test with: this is no Debian")

    def build(folder: Path) -> None:
        AptRoot.open("apt-release", (release,)).unpack_with_dependencies(_PACKAGES, release, folder)

    try:
        return cached("ceph", build)
    except Unavailable as reason:
        raise Unavailable(f"no Ceph gateway to test with: {reason}") from reason


@dataclass
class RunningRgw:
    """A gateway that runs."""

    folder: Path
    root: Path  #: of the unpacked packages
    port: int
    tls_port: int
    certificate: Certificate
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    leash: tuple[int, int] = field(default_factory=os.pipe)  #: nothing is written; its end is what counts

    def endpoint(self, **changes: Any) -> Endpoint:
        """How Fleece reaches it."""
        values: dict[str, Any] = {
            "id": "rgw",
            "endpoint": "127.0.0.1",
            "access_key": ACCESS_KEY,
            "secret": SECRET,
            "port": self.port,
            "region": REGION,
            "path_style": True,
            "allow_http": True,
        }
        return Endpoint(**{**values, **changes})

    def encrypted_endpoint(self, **changes: Any) -> Endpoint:
        """How Fleece reaches it over TLS."""
        pinned = {"port": self.tls_port, "allow_http": False, "fingerprint": self.certificate.fingerprint}
        return self.endpoint(**{**pinned, **changes})

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket, with a new name unless one is given; returns the name."""
        name = name or f"fleece-{uuid.uuid4().hex[:12]}"
        host, date = f"127.0.0.1:{self.port}", format_date(time.time())
        headers = {"host": host, "x-amz-date": date, "x-amz-content-sha256": EMPTY_SHA256}
        signer = Signer(ACCESS_KEY, SECRET, REGION)
        signature = signer.authorization("PUT", f"/{name}/", (), list(headers.items()), EMPTY_SHA256, date)
        connection = http.client.HTTPConnection(host, timeout=_PATIENCE_S)
        try:
            connection.request("PUT", f"/{name}/", headers={**headers, "authorization": signature})
            answer = connection.getresponse()
            assert answer.status == 200, (answer.status, answer.read())
        finally:
            connection.close()
        return name

    def start_gateway(self) -> None:
        """Start the gateway, and wait until it answers."""
        self._start("rgw", "radosgw", "-f", "-n", "client.rgw.a")
        self._wait(self.port, "rgw")

    def kill_gateway(self) -> None:
        """Kill the gateway, as a crash does; objects stay."""
        _kill(self.processes.pop("rgw"))

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.root / "usr/bin" / program), *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
        assert done.returncode == 0, f"{program} {arguments[0]}: {done.stderr}\n{self._logs()}"
        return done.stdout

    def _ceph(self, *arguments: str) -> str:
        line = ["/usr/bin/python3", str(self.root / "usr/bin/ceph"), "--connect-timeout", "60", *arguments]
        environment = {**self._environment(), "PYTHONPATH": str(self.root / "usr/lib/python3/dist-packages")}
        done = subprocess.run(
            line, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE_S
        )
        assert done.returncode == 0, f"ceph {arguments}: {done.stderr}\n{self._logs()}"
        return done.stdout

    def _start(self, name: str, program: str, *arguments: str) -> None:
        bounded = ["sh", "-c", _LEASH, str(LIFETIME_S), str(self.root / "usr/bin" / program), *arguments]
        with (self.folder / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                bounded,
                env=self._environment(),
                stdin=self.leash[0],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _wait(self, port: int, name: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            assert self.processes[name].poll() is None, f"{name} ended\n{self._logs()}"
            assert time.monotonic() < deadline, f"{name} does not answer\n{self._logs()}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        libraries = [self.root / "usr/lib" / _triplet(), self.root / "lib" / _triplet()]
        paths = ":".join(str(path) for path in (*libraries, libraries[0] / "ceph"))
        return {**os.environ, "LD_LIBRARY_PATH": paths, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _logs(self) -> str:
        said = []
        for path in sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("*.out")):
            said.append(f"{path.name}: {path.read_text(errors='replace')[-1500:]}")
        return "\n".join(said)

    def _end(self) -> None:
        # Nothing of it is needed any more, and an orderly end takes 5 s.
        for process in reversed(self.processes.values()):
            _kill(process)
        for end in self.leash:
            os.close(end)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a program and what holds its leash: they are a session of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@contextmanager
def running_rgw(*, memory: int = 4 << 30) -> Iterator[RunningRgw]:
    """A gateway with one user and no buckets while the block runs; `memory` is bytes for all objects, at most.

    Raises:
        Unavailable: Ceph cannot be had.
    """
    root = ceph()
    folder = Path(tempfile.mkdtemp(prefix="fleece-rgw-", dir="/tmp"))
    mon_port, rgw_port, tls_port = _free_ports(3)
    running = RunningRgw(folder, root, rgw_port, tls_port, make_certificate(folder / "tls.pem"))
    try:
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        fsid = str(uuid.uuid4())
        libraries = root / "usr/lib" / _triplet()
        (folder / "ceph.conf").write_text(
            _CONF.format(
                fsid=fsid,
                folder=folder,
                libraries=libraries,
                mon_port=mon_port,
                rgw_port=rgw_port,
                tls_port=tls_port,
                memory=memory,
            )
        )
        monmap = str(folder / "monmap")
        running._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", monmap)
        running._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        running._start("mon", "ceph-mon", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        running._ceph("osd", "new", osd)
        running._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        running._start("osd", "ceph-osd", "-f", "-i", "0")
        names = ["--uid", "fleece", "--display-name", "fleece", "--access-key", ACCESS_KEY, "--secret", SECRET]
        running._start("rgw", "radosgw", "-f", "-n", "client.rgw.a")
        made = json.loads(running._run("radosgw-admin", "-n", "client.rgw.a", "user", "create", *names))
        assert made["user_id"] == "fleece"
        running._wait(rgw_port, "rgw")
        yield running
    finally:
        running._end()
        shutil.rmtree(folder, ignore_errors=True)


def _triplet() -> str:
    return f"{os.uname().machine}-linux-gnu"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def main(arguments: Sequence[str]) -> None:
    """Run a gateway with the buckets `arguments` until standard input ends or Ctrl-C."""
    with running_rgw() as gateway:
        for name in arguments:
            gateway.make_bucket(name)
        print(f"http://127.0.0.1:{gateway.port}", ACCESS_KEY, SECRET, flush=True)
        print(f"https://127.0.0.1:{gateway.tls_port}", gateway.certificate.path, flush=True)
        try:
            sys.stdin.read()
        except KeyboardInterrupt:
            print("ends", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
