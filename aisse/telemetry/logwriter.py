"""Lines for a descriptor that may take none: a pipe that nobody reads, a stopped terminal, a full disk.

One thread writes them from a queue that is bounded in bytes, so that whoever logs never waits. What does not fit is
dropped and counted.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# PIPE_BUF on Linux: up to here a write to a pipe is never mixed with what other processes write there (pipe(7)).
_ATOMIC_BYTES = 4096

# After a write, lines are gathered for so long. To wake the thread for each line would cost more than the write.
_GATHER_S = 0.005

# A descriptor that polls as writable and then takes nothing is tried again after this.
_AGAIN_S = 0.01

# These stand in the queue where lines are missing, and at its end.
_GAP: Final = b""
_END: Final = None


class LogWriter:
    """Writes lines to `descriptor`, which it never closes, in the order in which they were put.

    - At most `buffer_bytes` wait. Past that, lines are dropped until everything that waits is written:
      test_pipe_that_nobody_reads_costs_the_lines_past_the_bound_and_nothing_else.
    - `dropped_line` gets the number of dropped lines and makes the line that stands in their place:
      test_lines_after_a_gap_follow_its_number.
    - A write that fails (the reader is gone, the disk is full) drops its lines in the same way, and the next write is
      tried as if nothing had happened: test_full_disk_costs_lines_until_there_is_room_again.
    - A line of up to 4 KiB is written whole or not at all, even where other processes write to the same pipe:
      test_lines_of_two_writers_of_one_pipe_are_not_mixed.
    - Every line is written or counted: test_threads_put_at_once_and_every_line_is_written_or_counted.
    """

    def __init__(self, descriptor: int, buffer_bytes: int, dropped_line: Callable[[int], bytes] | None = None) -> None:
        self._descriptor = descriptor
        self._limit = buffer_bytes
        self._dropped_line = dropped_line
        # Both can be entered again by the thread that is in them: the garbage collector may run a destructor that logs.
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._pending = 0  # bytes that are queued or being written
        self._dropped = 0
        self._missing = 0  # lines in the gap
        self._gap = False  # one is in the queue, at its end
        self._closing = threading.Event()
        # The thread's own.
        self._untold = 0  # lines that are lost and that no `dropped_line` has told of yet
        self._torn = False  # the last write ended within a line
        # A daemon: at exit nobody waits for a write that never returns.
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines so far that were not written."""
        return self._dropped

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written."""
        return self._pending == 0

    def put(self, line: bytes) -> None:
        """Queues a line, its line end included. Never waits and never raises; safe from every thread."""
        size = len(line)
        with self._lock:
            if self._gap or self._pending + size > self._limit or self._closing.is_set():
                self._dropped += 1
                self._missing += 1
                if not self._gap:
                    self._gap = True
                    self._queue.put(_GAP)
            elif size:
                self._pending += size
                self._queue.put(line)

    def close(self, timeout_s: float) -> bool:
        """Waits until everything is written, `timeout_s` at most; False if it is not. What is put later is dropped."""
        with self._lock:
            if not self._closing.is_set():
                self._closing.set()
                self._queue.put(_END)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            lines = [self._queue.get()]
            # No more than there are now, however many more come meanwhile.
            lines += [self._queue.get() for _ in range(self._queue.qsize())]
            for group in _groups(lines):
                if group is _END:
                    return
                if not group:
                    with self._lock:
                        self._untold += self._missing
                        self._missing = 0
                        self._gap = False
                self._write_group(group)
            self._closing.wait(_GATHER_S)

    def _write_group(self, lines: list[bytes]) -> None:
        if self._untold and self._dropped_line is not None and self._write([self._dropped_line(self._untold)]):
            self._untold = 0
        lost = len(lines) - self._write(lines)
        self._untold += lost
        with self._lock:
            self._dropped += lost
            self._pending -= sum(map(len, lines))

    def _write(self, lines: list[bytes]) -> int:
        """How many of the lines were written, whole."""
        data = b"".join(lines)
        if not data:
            return 0
        if self._torn:
            data = b"\n" + data
        done = 0
        while done < len(data):
            try:
                done += os.write(self._descriptor, data[done:])
            except BlockingIOError:
                # A process that shares the descriptor made it non-blocking (Node does). It is waited for all the same.
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
                time.sleep(_AGAIN_S)
            except OSError:
                break
        if done:
            done -= self._torn
            self._torn = False
        whole = 0
        for line in lines:
            if done < len(line):
                self._torn = done > 0 or self._torn
                break
            done -= len(line)
            whole += 1
        return whole


def _groups(lines: Iterable[bytes | None]) -> Iterator[list[bytes] | None]:
    """As many lines as one write may hold; [] for a gap, None for the end."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        if group and (not line or size + len(line) > _ATOMIC_BYTES):
            yield group
            group, size = [], 0
        if not line:
            yield _END if line is _END else []
        else:
            group.append(line)
            size += len(line)
    if group:
        yield group
