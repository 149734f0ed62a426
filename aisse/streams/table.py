"""The streams that are here: those that run, those that are kept after their end, and the memory of both."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from aisse.errors import KeyReusedError, RequestError

if TYPE_CHECKING:
    from aisse.replay.memory import ReplayMemory
    from aisse.streams.stream import Stream

Key = tuple[bytes, str]
"""Whose Idempotency-Key (a digest of the access token, empty without) and the key itself."""

# What a finished stream takes beside its frames: 1.7 KB as tracemalloc counts it, 1.9 KB of resident memory. Uncounted,
# a crowd of tiny answers would take several times replay_bytes.
KEPT_BYTES = 2 << 10


class Table:
    """Streams by their ids and keys. Everything is synchronous.

    - A stream runs or is kept, never both; a key leads to its stream for as long as that is here.
    - `memory` counts what all logs hold, and KEPT_BYTES for each stream that is kept
      (test_finished_streams_go_oldest_end_first_when_memory_is_full).
    - A stream that is read is never forgotten (test_finished_stream_that_is_read_is_kept_and_the_next_goes).
    """

    def __init__(self, memory: ReplayMemory, *, retention_s: float, past: int = 0) -> None:
        """`retention_s` is how long a stream is kept after its end, `past` how many ids are remembered after that."""
        self.memory = memory
        self.running: dict[str, Stream] = {}
        self.kept: OrderedDict[str, Stream] = OrderedDict()
        """Streams that have ended, oldest end first."""
        self._retention_s = retention_s
        self._keys: dict[Key, tuple[Stream, bytes]] = {}
        self._past_limit = past
        self._past: OrderedDict[str, None] = OrderedDict()  # oldest first

    def get(self, stream_id: str) -> Stream | None:
        """The stream of that id that runs or is kept here."""
        return self.running.get(stream_id) or self.kept.get(stream_id)

    def by_key(self, key: Key, digest: bytes) -> Stream | None:
        """The stream that the key started; None for a new key.

        `digest` is that of the question that came with it. Raises RequestError (422) where it was another one before.
        """
        if (known := self._keys.get(key)) is None:
            return None
        if known[1] != digest:
            raise KeyReusedError
        return known[0]

    def add_key(self, key: Key, stream: Stream, digest: bytes) -> None:
        """From now on the key leads to that stream."""
        stream.key = key
        self._keys[key] = stream, digest

    def keep(self, stream: Stream) -> None:
        """The stream has ended, here or elsewhere. It is kept for whoever comes to read it."""
        self.running.pop(stream.id, None)
        self.kept[stream.id] = stream
        self.memory.used += KEPT_BYTES

    def refuse(self, stream: Stream) -> None:
        """The stream has ended before it began. Its key may be tried again, and it is kept only if its id is known."""
        self._free_key(stream)
        if stream.known:
            self.keep(stream)
        else:
            self.running.pop(stream.id, None)
            self._release(stream)

    def was_here(self, stream_id: str) -> bool:
        """Whether a stream of that id was here lately, and is not any more."""
        return stream_id in self._past

    def note_gone(self, stream_id: str) -> None:
        """A stream that was here is not any more."""
        self._past[stream_id] = None
        if len(self._past) > self._past_limit:
            self._past.popitem(last=False)

    # --- memory -----------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether there is no room for another stream, whatever is forgotten for it."""
        return self.memory.used >= self.memory.limit and not any(s.readers == 0 for s in self.kept.values())

    def need_room(self) -> None:
        """Raises RequestError (503) where there is no room for another stream, whatever is forgotten for it."""
        if not self.make_room():
            raise RequestError(503, "overloaded_error", "the memory for answers is full", retry_after_s=5)

    def make_room(self) -> bool:
        """Forgets kept streams, oldest end first, while the bound is exceeded; readers at work keep theirs."""
        memory = self.memory
        if memory.used < memory.limit:
            return True
        while (oldest := next((stream for stream in self.kept.values() if stream.readers == 0), None)) is not None:
            self.forget(oldest)
            if memory.used < memory.limit:
                return True
        return False

    def expire(self, now: float) -> None:
        """Forgets streams whose time is over and that nobody reads."""
        for stream in list(self.kept.values()):
            assert stream.ended is not None
            if now - stream.ended < self._retention_s:
                break
            if stream.readers == 0:
                self.forget(stream)

    def forget(self, stream: Stream) -> None:
        """Keeps a stream no longer."""
        del self.kept[stream.id]
        self.memory.used -= KEPT_BYTES
        self._release(stream)

    def _release(self, stream: Stream) -> None:
        stream.log.discard()
        self._free_key(stream)
        self.note_gone(stream.id)

    def _free_key(self, stream: Stream) -> None:
        if stream.key is not None and self._keys.get(stream.key, (None,))[0] is stream:
            del self._keys[stream.key]
