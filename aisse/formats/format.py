"""What a wire format has to know: the contract between a format and whoever relays it.

Whoever needs a format is given it by its constructor. Only `known` imports one by its name. How this server says an
error to its own clients is no format's to know: `errors.error_body` is the one shape, whatever the upstream speaks.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from multidict import MultiMapping

    from aisse.formats.errors import Said


class Mark(enum.Enum):
    """What the relay has to know of an event."""

    CONTENT = enum.auto()
    """It is passed on. Every event whose type is not known is content."""
    PING = enum.auto()
    """It is passed on, and says nothing but that the connection lives."""
    END = enum.auto()
    """It is passed on, and the answer is complete with it."""
    ERROR = enum.auto()
    """The upstream says that it has failed. Readers are told so by an event of our own."""
    RESERVED = enum.auto()
    """It is not passed on, because its type is one of `OURS`."""


# Names of their own: looking a member up in its enum is slow, and this is done for every event.
CONTENT, PING, END, ERROR, RESERVED = Mark

OURS = frozenset({b"end", b"reconnect"})
"""Types of our own events. An upstream's would end a reader's stream in the middle, or send the reader elsewhere."""


class Asked(NamedTuple):
    """A question that was checked, and what the upstream is asked for it."""

    pieces: tuple[bytes | memoryview, ...]
    """The body for the upstream, in pieces that follow each other."""
    model: str
    """The model that answers: the one that the question names, or the default."""
    most_tokens: int
    """The most output tokens that the answer may cost; 0 where the format cannot tell."""
    most_tokens_field: str
    """The field of the question that says so, for an error about it."""


class Follower(Protocol):
    """Follows one answer, event by event, and keeps the `usage` up to date that `Format.follow` was given."""

    def observe(self, event_type: bytes, body: bytes) -> Mark:
        """What the next event is. It is given in the two parts of a `sse.RawEvent`.

        This is called for every event of every stream: look for the most common type first. It must not raise,
        whatever the upstream sends.
        """

    def is_whole(self, data: bytes) -> bool:
        """Whether `data` is all of an event's data, where the body has ended without the blank line after it.

        The body of a server that crashed may end in half of an event, too.
        """

    def is_complete(self) -> bool:
        """Whether the answer is complete if its body ends now, in order, although no event was marked END."""


class Format(Protocol):
    """What one kind of upstream speaks. It is made from the settings, and keeps nothing of any question or answer.

    A question goes through `passed_on` and `ask` to `endpoint`, with `headers`. The events of its answer go through
    the `Follower` that `follow` makes, and those that a reader has missed through `compact`.
    """

    request_headers: tuple[str, ...]
    """The headers of a client's request that this format looks at. Pages of other origins may send them."""

    usage_word: bytes
    """Bytes that stand in every event that tells usage, and that no text of an answer can have in it."""

    def passed_on(self, headers: MultiMapping[str]) -> dict[str, str]:
        """The headers of a client's request that go on to the upstream. Raises RequestError (400) for a bad one."""

    async def ask(self, body: bytes | bytearray) -> Asked:
        """Checks the body of a client's request, and adds the defaults.

        `body` is UTF-8, and bounded as `routes/intake` says. It is not copied where it is large, so that it must not
        change any more. Others get a turn between two passes over a large one; cancelling it is safe. Raises
        RequestError (400), which names the field and quotes nothing of what the client said, but for the beginning of
        a field's name that is not known.
        """

    def endpoint(self, path: str) -> str:
        """The path that questions go to, for the `path` of the base URL that the operator has given."""

    def headers(self, key: str | None) -> Mapping[str, str]:
        """The headers that every question to the upstream has in this format, the upstream's `key` among them."""

    def follow(self, usage: dict[str, int]) -> Follower:
        """A follower for one answer.

        It keeps `input_tokens` and `output_tokens` of `usage` up to date. Both count from the beginning of the answer.
        """

    def compact(self, frames: bytes) -> bytes:
        """Whole frames, with each run of adjacent events that only add text to the same place merged into one event.

        A merged event has the id of its last. What a client adds up stays the same to the byte. Frames that are compact
        stay as they are. A format that cannot merge returns `frames`.
        """

    def read_error(self, payload: bytes) -> Said:
        """What the body of an error says, or the data of an event that was marked ERROR. Empty where it says nothing.

        It must not raise, whatever the upstream sends.
        """
