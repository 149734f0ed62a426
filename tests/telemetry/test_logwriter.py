"""aisse.telemetry.logwriter: real pipes and files, read or not."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from aisse.telemetry.logwriter import LogWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PIPE_BYTES = 4096
MANY_S = 60.0


def notice(lines: int) -> bytes:
    return b"dropped %d\n" % lines


class Pipe:
    """A pipe of one page."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def read_to_end(self) -> list[bytes]:
        """The lines that come until nobody writes any more; closes this process's writing end."""
        os.close(self.writing)
        self.writing = -1
        with os.fdopen(os.dup(self.reading), "rb") as file:
            return file.read().splitlines(keepends=True)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    for descriptor in (pipe.reading, pipe.writing):
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


class Collected(threading.Thread):
    """Reads a pipe to its end, from the start of this thread on."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self.data = b""
        self._descriptor = descriptor
        self.start()

    def run(self) -> None:
        while data := os.read(self._descriptor, 512):
            self.data += data

    def lines(self) -> list[bytes]:
        self.join(MANY_S)
        assert not self.is_alive()
        return self.data.splitlines(keepends=True)


def line(number: int, size: int = 100) -> bytes:
    return (b"%d " % number).ljust(size - 1, b".") + b"\n"


def test_lines_are_written_in_order_and_whole_at_the_close(pipe: Pipe) -> None:
    said = [line(number, 1 + 37 * number % 9000 + 8) for number in range(500)]
    reader = Collected(pipe.reading)
    writer = LogWriter(pipe.writing, 1 << 30, notice)
    for each in said:
        writer.put(each)
    assert writer.close(MANY_S)
    assert (writer.dropped, writer.idle) == (0, True)
    os.close(pipe.writing)
    pipe.writing = -1
    assert reader.lines() == said


def test_pipe_that_nobody_reads_costs_the_lines_past_the_bound_and_nothing_else(pipe: Pipe) -> None:
    """Whoever puts never waits, and what was dropped stands once, as a number, where it is missing."""
    writer = LogWriter(pipe.writing, 100_000, notice)
    said = [line(number) for number in range(5000)]
    for each in said:
        writer.put(each)
    kept = 5000 - writer.dropped
    # All that may wait does, and what the pipe itself has taken comes on top.
    assert 1000 <= kept <= 1000 + PIPE_BYTES // 100
    reader = Collected(pipe.reading)
    assert writer.close(MANY_S)
    os.close(pipe.writing)
    pipe.writing = -1
    assert reader.lines() == [*said[:kept], notice(5000 - kept)]


def test_lines_after_a_gap_follow_its_number(pipe: Pipe) -> None:
    os.write(pipe.writing, line(0, PIPE_BYTES))  # full from the start: there is one gap
    writer = LogWriter(pipe.writing, 1000, notice)
    for number in range(100):
        writer.put(line(number))
    reader = Collected(pipe.reading)
    # Lines are dropped until all that waited is written; the first one after that comes.
    while True:
        lost = writer.dropped
        writer.put(line(7_000_000))
        if writer.dropped == lost:
            break
    assert writer.close(MANY_S)
    os.close(pipe.writing)
    pipe.writing = -1
    found = reader.lines()
    (said,) = [each for each in found if each.startswith(b"dropped")]
    assert said == notice(writer.dropped)
    assert found[-2:] == [said, line(7_000_000)]


def test_line_longer_than_the_bound_is_dropped_and_told(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writing, 1000, notice)
    writer.put(b"x" * 1000 + b"\n")
    assert writer.dropped == 1
    assert writer.close(MANY_S)
    assert pipe.read_to_end() == [notice(1)]


def test_line_as_long_as_the_bound_is_written(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writing, 1000, notice)
    writer.put(line(1, 1000))
    assert writer.close(MANY_S)
    assert pipe.read_to_end() == [line(1, 1000)]


def test_close_where_nobody_reads_returns_in_time_and_says_so(pipe: Pipe) -> None:
    writer = LogWriter(pipe.writing, 1 << 20, notice)
    for number in range(100):
        writer.put(line(number))
    assert not writer.close(0.01)
    writer.put(line(100))
    assert writer.dropped == 1
    # What was put before still comes, and the thread ends with it.
    reader = Collected(pipe.reading)
    assert writer.close(MANY_S)
    os.close(pipe.writing)
    pipe.writing = -1
    assert reader.lines() == [*(line(number) for number in range(100))]


def test_descriptor_that_was_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    """Node does so to a terminal or pipe that it shares."""
    os.set_blocking(pipe.writing, False)
    said = [line(number) for number in range(1000)]
    writer = LogWriter(pipe.writing, 1 << 20, notice)
    for each in said:
        writer.put(each)
    assert not writer.close(0.05)
    reader = Collected(pipe.reading)
    assert writer.close(MANY_S)
    os.close(pipe.writing)
    pipe.writing = -1
    assert reader.lines() == said


def test_reader_that_is_gone_costs_its_lines_and_stops_nothing(pipe: Pipe) -> None:
    os.close(pipe.reading)
    pipe.reading = -1
    writer = LogWriter(pipe.writing, 1 << 20, notice)
    for number in range(100):
        writer.put(line(number))
    assert writer.close(MANY_S)
    assert (writer.dropped, writer.idle) == (100, True)


def test_full_disk_costs_lines_until_there_is_room_again(tmp_path: Path) -> None:
    """A limit of the file's size stands for the disk: part of a line is written, and then no more."""
    path = tmp_path / "log"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, hard))
        writer = LogWriter(descriptor, 1 << 20, notice)
        for number in range(5):
            writer.put(line(number))
        while not writer.idle:
            pass
        assert writer.dropped == 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.put(line(5))
        assert writer.close(MANY_S)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        os.close(descriptor)
    # What there is of the torn line stays alone on its own.
    assert path.read_bytes().splitlines(keepends=True) == [
        line(0),
        line(1),
        line(2)[:50] + b"\n",
        notice(3),
        line(5),
    ]


def test_lines_of_two_writers_of_one_pipe_are_not_mixed(pipe: Pipe) -> None:
    """As two processes that share standard error."""
    reader = Collected(pipe.reading)
    writers = [LogWriter(pipe.writing, 1 << 30, notice) for _ in range(2)]
    said = [[line(1000 * (1 + part) + number, 700) for number in range(400)] for part in range(2)]
    for pair in zip(*said, strict=True):
        for writer, each in zip(writers, pair, strict=True):
            writer.put(each)
    assert all(writer.close(MANY_S) for writer in writers)
    os.close(pipe.writing)
    pipe.writing = -1
    found = reader.lines()
    assert [each for each in found if each.startswith(b"1")] == said[0]
    assert [each for each in found if each.startswith(b"2")] == said[1]
    assert len(found) == 800


def test_threads_put_at_once_and_every_line_is_written_or_counted(pipe: Pipe) -> None:
    reader = Collected(pipe.reading)
    writer = LogWriter(pipe.writing, 2000, notice)

    def say(part: int) -> None:
        for number in range(2000):
            writer.put(line(part * 10_000 + number))

    threads = [threading.Thread(target=say, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close(MANY_S)
    os.close(pipe.writing)
    pipe.writing = -1
    found = reader.lines()
    told = sum(int(each.split()[1]) for each in found if each.startswith(b"dropped"))
    assert writer.dropped == told
    assert len([each for each in found if not each.startswith(b"dropped")]) == 8000 - told


def test_destructor_that_logs_in_the_middle_of_a_put_does_not_wait_for_it(pipe: Pipe) -> None:
    """The collector runs destructors wherever it likes, and asyncio's log."""
    writer = LogWriter(pipe.writing, 1 << 20, notice)

    class Logs:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            writer.put(b"destroyed\n")

    done = threading.Event()

    def say() -> None:
        with writer._lock:
            Logs()
            gc.collect()
        done.set()

    threading.Thread(target=say, daemon=True).start()
    assert done.wait(MANY_S)
    assert writer.close(MANY_S)
    assert pipe.read_to_end() == [b"destroyed\n"]
