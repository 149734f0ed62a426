"""sd_notify(3) and sd_listen_fds(3) against real sockets, descriptors and processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from activation import activated

from aisse.service.systemd import Notifier, inherited_sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Takes the descriptors over as a service does, says where they listen, and what a child of it inherits.
_SERVICE = """
import json, os, subprocess, sys
from aisse.errors import ConfigError
from aisse.service.systemd import inherited_sockets
try:
    sockets = inherited_sockets(os.environ)
except ConfigError as error:
    sys.exit(str(error))
child = "import json, os; print(json.dumps([os.listdir('/proc/self/fd'), [n for n in os.environ if 'LISTEN' in n]]))"
done = subprocess.run([sys.executable, "-c", child], close_fds=False, check=True, capture_output=True)
print(json.dumps([[taken.getsockname()[:2] for taken in sockets], *json.loads(done.stdout)]))
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    """A notification socket as systemd binds it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.settimeout(60)
        bound.bind(str(tmp_path / "notify"))
        yield bound


@pytest.fixture
def notifier(supervisor: socket.socket) -> Iterator[Notifier]:
    with contextlib.closing(Notifier.from_environment({"NOTIFY_SOCKET": supervisor.getsockname()})) as notifier:
        yield notifier


def received(supervisor: socket.socket) -> list[str]:
    """The lines of one datagram."""
    return supervisor.recv(4096).decode().split("\n")


def queued(supervisor: socket.socket) -> list[list[str]]:
    """All datagrams that are there already."""
    supervisor.setblocking(False)
    datagrams = []
    with contextlib.suppress(BlockingIOError):
        while True:
            datagrams.append(received(supervisor))
    return datagrams


# --- notifications --------------------------------------------------------------------------------------------


def test_each_call_is_one_datagram_of_the_protocol(supervisor: socket.socket, notifier: Notifier) -> None:
    notifier.ready()
    notifier.status("12 streams, 14 readers")
    notifier.alive()
    notifier.stopping()
    assert queued(supervisor) == [["READY=1"], ["STATUS=12 streams, 14 readers"], ["WATCHDOG=1"], ["STOPPING=1"]]


def test_status_of_several_lines_is_sent_as_one_and_sets_nothing_else(
    supervisor: socket.socket, notifier: Notifier
) -> None:
    notifier.status("a\nMAINPID=1\r\n")
    assert queued(supervisor) == [["STATUS=a MAINPID=1"]]


def test_abstract_socket_is_found_behind_its_at_sign() -> None:
    name = f"aisse-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.settimeout(60)
        supervisor.bind("\0" + name)
        with contextlib.closing(Notifier.from_environment({"NOTIFY_SOCKET": "@" + name})) as notifier:
            notifier.ready()
        assert received(supervisor) == ["READY=1"]


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative/path"])
def test_no_supervisor_or_one_out_of_reach_is_told_nothing(address: str) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    assert notifier.alive_every_s is None
    notifier.ready()
    notifier.status("text")
    notifier.alive()
    notifier.stopping()
    notifier.close()


def test_variables_are_taken_out_of_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid()), "LANG": "C"}
    Notifier.from_environment(environ).close()
    assert environ == {"LANG": "C"}


def test_supervisor_that_went_away_harms_nobody(supervisor: socket.socket, notifier: Notifier) -> None:
    supervisor.close()
    notifier.ready()
    notifier.alive()


def test_supervisor_that_comes_back_at_its_address_is_told_again(
    supervisor: socket.socket, notifier: Notifier, tmp_path: Path
) -> None:
    supervisor.close()
    (tmp_path / "notify").unlink()
    notifier.status("lost")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
        again.bind(str(tmp_path / "notify"))
        notifier.status("told")
        assert queued(again) == [["STATUS=told"]]


def test_full_queue_never_blocks_and_only_delays_what_has_to_arrive(
    supervisor: socket.socket, notifier: Notifier
) -> None:
    sent = 10_000  # more than any kernel's net.unix.max_dgram_qlen and send buffer let wait
    for number in range(sent):
        notifier.status(str(number))
    notifier.ready()
    notifier.stopping()
    arrived = queued(supervisor)
    assert 0 < len(arrived) < sent
    assert all(len(lines) == 1 and lines[0].startswith("STATUS=") for lines in arrived)
    notifier.alive()
    notifier.alive()
    assert queued(supervisor) == [["READY=1", "STOPPING=1", "WATCHDOG=1"], ["WATCHDOG=1"]]


def test_nothing_is_sent_after_close(supervisor: socket.socket, notifier: Notifier) -> None:
    notifier.close()
    notifier.ready()
    notifier.close()
    assert queued(supervisor) == []


@pytest.mark.parametrize(
    ("watchdog", "every_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "1" * 400}, None),
        ({"WATCHDOG_USEC": "٣"}, None),
        ({}, None),
    ],
)
def test_watchdog_of_this_process_is_answered_at_half_its_time(
    supervisor: socket.socket, watchdog: dict[str, str], every_s: float | None
) -> None:
    environ = {"NOTIFY_SOCKET": supervisor.getsockname(), **watchdog}
    with contextlib.closing(Notifier.from_environment(environ)) as notifier:
        assert notifier.alive_every_s == every_s


# --- sockets --------------------------------------------------------------------------------------------------


def started(*sockets: socket.socket) -> subprocess.CompletedProcess[str]:
    """A service that was passed `sockets` takes them over and ends."""
    line, arguments = activated([sys.executable, "-c", _SERVICE], *(each.fileno() for each in sockets))
    return subprocess.run(line, **arguments, capture_output=True, text=True, timeout=60, check=False)


def listener(family: socket.AddressFamily = socket.AF_INET, host: str = "127.0.0.1") -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.bind((host, 0))
    listening.listen()
    return listening


def test_sockets_are_taken_over_in_order_and_kept_from_children() -> None:
    with listener() as one, listener() as two:
        done = started(one, two)
        assert done.stderr == ""
        addresses, descriptors, variables = json.loads(done.stdout)
        assert addresses == [list(one.getsockname()), list(two.getsockname())]
    # 3 is the directory that the child lists; the service's own 3 and 4 would have left it no place there.
    assert sorted(descriptors) == ["0", "1", "2", "3"]
    assert variables == []


def test_socket_of_ipv6_is_taken_over() -> None:
    try:
        listening = listener(socket.AF_INET6, "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with listening:
        done = started(listening)
        assert json.loads(done.stdout)[0] == [list(listening.getsockname()[:2])]


def test_socket_goes_on_listening_where_it_was_taken_over_and_closed() -> None:
    """The process ends, and what it was passed is still open for the next."""
    with listener() as held:
        assert started(held).returncode == 0
        with socket.create_connection(held.getsockname(), timeout=60):
            held.settimeout(60)
            held.accept()[0].close()


def unix_listener(directory: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(directory / "socket"))
    listening.listen()
    return listening


def datagrams(_directory: Path) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.bind(("127.0.0.1", 0))
    return bound


def not_listening(_directory: Path) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.bind(("127.0.0.1", 0))
    return bound


@pytest.mark.parametrize("wrong", [unix_listener, datagrams, not_listening])
def test_socket_of_another_kind_is_refused_in_one_line(tmp_path: Path, wrong: Callable[[Path], socket.socket]) -> None:
    with listener() as right, wrong(tmp_path) as other:
        done = started(right, other)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("LISTEN_FDS: descriptor 4 is no listening TCP socket; ")
    assert done.stderr.count("\n") == 1


def test_descriptor_that_is_no_socket_is_refused() -> None:
    line, arguments = activated([sys.executable, "-c", _SERVICE], 0)
    done = subprocess.run(line, **arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("LISTEN_FDS: descriptor 3 is no listening TCP socket; ")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "many", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_descriptors_for_nobody_or_another_process_are_left_alone(environ: dict[str, str]) -> None:
    """Descriptors 3 and up are something else's here: taking them would break this very process."""
    given = environ | {"LISTEN_FDNAMES": "aisse.socket", "LANG": "C"}
    assert inherited_sockets(given) == []
    assert given == {"LANG": "C"}
