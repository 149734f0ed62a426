"""Questions on their way to the upstream: their bytes in pieces, and the count of all."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aisse.errors import RequestError
from aisse.upstream.question import Bodies, Hold, Pieces

if TYPE_CHECKING:
    from collections.abc import Sequence


class Writer:
    """As much of aiohttp's writer as a payload needs. `most_at_once` is written without that others run."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.most_at_once = 0
        self._since = 0

    async def write(self, chunk: bytes | memoryview) -> None:
        self.written.append(bytes(chunk))
        self._since += len(chunk)
        self.most_at_once = max(self.most_at_once, self._since)
        asyncio.get_running_loop().call_soon(self._ran)

    def _ran(self) -> None:
        self._since = 0


@pytest.mark.parametrize(
    "pieces",
    [
        [b"{}"],
        [b'{"a":', memoryview(bytearray(b"x" * 1_000_000)), b"}"],
        [b'{"a":', memoryview(bytes(range(256)) * 256), b',"b":', memoryview(b"y" * ((64 << 10) + 1)), b"}"],
    ],
)
async def test_payload_is_written_in_small_pieces_as_often_as_asked(pieces: Sequence[bytes | memoryview]) -> None:
    """Others run in between: of 32 MiB in one go nobody else would hear for 9 ms."""
    whole = b"".join(pieces)
    for _ in range(2):
        writer: Any = Writer()
        payload = Pieces(pieces)
        assert payload.size == len(whole)
        assert payload.content_type == "application/json"
        await payload.write_with_length(writer, payload.size)
        assert b"".join(writer.written) == whole
        assert max(len(part) for part in writer.written) <= 64 << 10
        assert writer.most_at_once <= (128 << 10) + 100
    assert payload.decode("latin-1") == whole.decode("latin-1")


LIMIT = 1000


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["grow", "leave", "hand over", "release"]), st.integers(0, 500))
    )
)
def test_count_of_bodies_is_what_a_model_says_whatever_becomes_of_them(steps: list[tuple[int, str, int]]) -> None:
    bodies = Bodies(LIMIT)
    holds: dict[int, tuple[Hold, contextlib.ExitStack]] = {}
    sizes: dict[int, int] = {}  # of holds that still keep something
    for number, step, size in steps:
        if number not in holds:
            stack = contextlib.ExitStack()
            holds[number] = stack.enter_context(bodies.hold()), stack
            sizes[number] = 0
        hold, stack = holds[number]
        match step:
            case "grow" if sum(sizes.values()) + size > LIMIT:
                with pytest.raises(RequestError) as refused:
                    hold.grow(size)
                assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
            case "grow":
                hold.grow(size)
                sizes[number] += size
            case "hand over":
                hold.taken_over = True
            case "leave":
                stack.close()
                if not hold.taken_over:
                    sizes[number] = 0
                # A relay lets go of what it took over later.
                hold.release()
                del holds[number], sizes[number]
            case "release":
                hold.release()
                sizes[number] = 0
        assert bodies.used == sum(sizes.values()) <= LIMIT
    for hold, stack in holds.values():
        stack.close()
        hold.release()
    assert bodies.used == 0


def test_body_that_was_taken_over_is_counted_until_it_is_let_go() -> None:
    bodies = Bodies(LIMIT)
    with bodies.hold() as hold:
        hold.grow(10)
        hold.taken_over = True
    assert bodies.used == 10
    hold.release()
    hold.release()
    assert bodies.used == 0


@pytest.mark.parametrize(("size", "fits"), [(LIMIT - 1, True), (LIMIT, True), (LIMIT + 1, False)])
def test_bodies_fit_up_to_the_limit(size: int, fits: bool) -> None:
    bodies = Bodies(LIMIT)
    with bodies.hold() as hold, contextlib.nullcontext() if fits else pytest.raises(RequestError):
        hold.grow(size)
    assert bodies.used == 0
