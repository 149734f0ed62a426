"""Idempotency-Keys on all instances: who has one, and how it becomes free again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import secrets
from typing import TYPE_CHECKING

from redis import exceptions

from aisse.errors import LogUnavailableError
from aisse.replay.connection import ANSWER_S
from aisse.streams.endings import never_began

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aisse.replay.mirror import Mirror
    from aisse.streams.stream import Stream
    from aisse.streams.table import Key


class Claims:
    """Claims keys for streams that are to be, and withdraws streams that nobody was told of.

    A claim whose end nobody has heard is taken back (test_claim_without_an_answer_is_taken_back,
    test_claim_whose_client_leaves_is_taken_back). What is on its way back has a task of its own until Redis has it.
    """

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._withdrawing: dict[asyncio.Task[None], str] = {}  # and the key that is about to be free, if there is one

    async def settled(self, within_s: float) -> bool:
        """Whether Redis has forgotten what was withdrawn, now or `within_s`."""
        return not self._withdrawing or not (await asyncio.wait(self._withdrawing, timeout=within_s))[1]

    async def close(self) -> None:
        """Cancels and awaits what is on its way."""
        tasks = list(self._withdrawing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def claim(self, who_and_key: Key, request: bytes) -> tuple[str, str | None]:
        """The id of a new stream for an Idempotency-Key, and the id of the stream that has the key.

        Both are the same where no other stream has it; the second is None where that came with another request. Where
        it is cancelled the key is free again. One call for a key at a time.
        """
        key = _digest(who_and_key)
        stream_id = _new_id(key[0])
        # Otherwise the claim might come before the key is free, and find a stream that never begins.
        before = [task for task, freed in self._withdrawing.items() if freed == key]
        if before and (await asyncio.wait(before, timeout=ANSWER_S))[1]:
            raise LogUnavailableError
        task = asyncio.create_task(self._mirror.claim(key, stream_id, _text(request)))
        try:
            holder, asked = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._spawn(self._unclaim(task, stream_id, key), key)
            raise
        except (exceptions.RedisError, OSError, TimeoutError):
            # The claim may hold all the same, or will.
            self._spawn(self._mirror.withdraw(stream_id, key, *never_began(stream_id)), key)
            raise LogUnavailableError from None
        return stream_id, holder if asked == _text(request) else None

    async def _unclaim(self, claim: asyncio.Task[tuple[str, str]], stream_id: str, key: str) -> None:
        with contextlib.suppress(exceptions.RedisError, OSError, TimeoutError):
            await claim
        await self._mirror.withdraw(stream_id, key, *never_began(stream_id))

    def withdraw(self, stream: Stream) -> None:
        """Has a stream that has ended forgotten, since nobody here was told of it, and its key.

        Other instances have answered their readers already: where there are some, it ends for them as it did here.
        """
        digest = _digest(stream.key) if stream.key is not None else None
        log = stream.log
        frames, last_seq = log.read(0), log.last_seq
        if len(frames) < log.tail:  # more than a segment of pings
            frames, last_seq = never_began(stream.id, last_seq)
        self._spawn(self._mirror.withdraw(stream.id, digest, frames, last_seq), digest)

    def renounce(self, stream_id: str, key: Key) -> None:
        """Has what was claimed for a key forgotten: the stream could not be started."""
        digest = _digest(key)
        self._spawn(self._mirror.withdraw(stream_id, digest, *never_began(stream_id)), digest)

    def _spawn(self, work: Coroutine[object, object, None], key: str | None) -> None:
        task = asyncio.create_task(work)
        self._withdrawing[task] = key or ""
        task.add_done_callback(self._withdrawing.pop)


def named(claim: tuple[Key, bytes]) -> tuple[str, str]:
    """A claimed key and the digest of its request, as Redis has them."""
    return _digest(claim[0]), _text(claim[1])


def _new_id(first: str) -> str:
    """A stream's id that begins with `first`, which is its bucket; the rest is as random as any."""
    while True:
        stream_id = secrets.token_urlsafe(16)
        if stream_id[0] == first:
            return stream_id


def _digest(key: Key) -> str:
    """Names an Idempotency-Key, and whose it is, without telling either."""
    return _text(hashlib.sha256(key[0] + b"\n" + key[1].encode()).digest())


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
