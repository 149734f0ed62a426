"""The shared log as the registry has it: connections to Redis, what uses them, and what is wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import structlog
from redis import exceptions

from aisse.errors import ConfigError, LogUnavailableError
from aisse.replay.catalogue import Catalogue
from aisse.replay.connection import ANSWER_S, connect, wrong_url
from aisse.replay.mirror import Mirror
from aisse.replay.tailer import BLOCK_S, Tailer
from aisse.replay.terms import Terms
from aisse.replay.troubles import Troubles, in_words
from aisse.streams.claims import Claims, named
from aisse.streams.elsewhere import Elsewhere
from aisse.streams.followed import Following

if TYPE_CHECKING:
    from aisse.formats.format import Format
    from aisse.replay.mirror import RedisLog
    from aisse.settings import Settings
    from aisse.streams.table import Key, Table

# Connections beside the one that waits for what comes: appends, leases, readers' and clients' requests.
_CONNECTIONS = 4

# Scripts need it, for their shebang and flags, and for TIME in those that write.
_LEAST_VERSION = (7, 0)

_log = structlog.get_logger("aisse.shared")


class Shared:
    """`start` and `close` bracket its life. Whatever needs Redis raises LogUnavailableError while it is away.

    A start that is refused leaves nothing open, and no task outlives `close`
    (test_start_that_is_refused_leaves_nothing_open).
    """

    def __init__(self, settings: Settings, table: Table, wire_format: Format) -> None:
        """`table` has the streams that run here, and keeps those from elsewhere that have ended.

        `wire_format` is what the streams are in. Raises ConfigError for a URL that cannot be meant.
        """
        self._memory = table.memory
        url = settings.log.get_secret_value()
        self._client = connect(url, _CONNECTIONS, ANSWER_S)
        self._blocking = connect(url, 1, ANSWER_S + BLOCK_S, redis_connect_func=self._reconnected)
        self._troubles = Troubles()  # of all parts together, so that a Redis that is away is one trouble
        self.elsewhere = Elsewhere(table.running)
        """What other instances say of the streams that run here."""
        terms = Terms(settings.log_tick_s, settings.lease_s, settings.retention_s, settings.stream_s)
        self._mirror = Mirror(self._client, self.elsewhere, terms, self._troubles)
        instance = self._mirror.token
        self._catalogue = Catalogue(self._client, instance, terms)
        self._tailer = Tailer(
            self._client,
            self._blocking,
            self._catalogue,
            instance,
            terms=terms,
            read_ahead_bytes=settings.read_ahead_bytes,
            troubles=self._troubles,
        )
        self.claims = Claims(self._mirror)
        """Idempotency-Keys, and streams that nobody was told of."""
        self.following = Following(table, self._catalogue, self._tailer, wire_format, terms.tick_s)
        """Streams that run elsewhere."""
        self.leave_grace_s = 2 * terms.interval_s
        """How much later than others a reader elsewhere is heard of."""
        self._running: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises ConfigError where Redis is not ours to use; nothing is open then. One that is down is waited for."""
        try:
            await self._check()
        except BaseException:
            await self.close()
            raise
        self._running = [
            asyncio.create_task(self._mirror.run(), name="shared log: mirror"),
            asyncio.create_task(self._tailer.run(), name="shared log: tailer"),
            asyncio.create_task(self.following.run(), name="shared log: following"),
        ]
        for task in self._running:
            task.add_done_callback(_tell_end)

    async def close(self) -> None:
        """Cancels and awaits every task. What Redis has not got is lost; see `settled`. Idempotent."""
        if self._running and self.trouble is None:
            await self._tailer.leave()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, self.claims.close(), self.following.close(), return_exceptions=True)
        self._running = []
        await self._client.aclose()
        await self._blocking.aclose()

    @property
    def runs(self) -> bool:
        """Whether it has been started and not been closed."""
        return bool(self._running)

    async def _reconnected(self, connection: Any) -> None:
        self._tailer.reconnected()
        await connection.on_connect()

    async def _check(self) -> None:
        try:
            version = (await self._client.info("server"))["redis_version"]
            memory = await self._client.info("memory")
            await self._catalogue.mark()
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            if (wrong := wrong_url(error)) is not None:
                raise ConfigError(f"log: {wrong}") from None
            _log.warning("shared log is not there yet; streams are served, and kept when it comes", why=in_words(error))
            return
        if tuple(map(int, version.split(".")[:2])) < _LEAST_VERSION:
            raise ConfigError(f"log: Redis {version} is too old; 7.0 or later, or Valkey, is needed")
        if (policy := memory.get("maxmemory_policy", "noeviction")) != "noeviction":
            _log.warning("shared log may lose what is in use: maxmemory-policy is not noeviction", policy=policy)
        # All at once, which opens the connections, too: the first stream is to be known as soon as any other.
        with contextlib.suppress(exceptions.RedisError, OSError, TimeoutError):
            await self._client.load_scripts()

    # --- streams that run here --------------------------------------------------------------------------------

    def log(self, stream_id: str, claim: tuple[Key, bytes] | None = None) -> RedisLog:
        """The log of a new stream. `claim` is what was claimed for it: the key, and the digest of its request."""
        return self._mirror.log(stream_id, self._memory, named(claim) if claim is not None else None)

    async def claim(self, key: Key, request: bytes) -> tuple[str, str | None]:
        """As Claims has it, but at once while Redis is away: each who asks would wait for its timeout."""
        if self.trouble is not None:
            raise LogUnavailableError
        return await self.claims.claim(key, request)

    async def settled(self, within_s: float) -> bool:
        """Whether everything has been shared, and what was withdrawn forgotten, now or `within_s`."""
        until = asyncio.get_running_loop().time() + within_s
        if not await self._mirror.settled(within_s):
            return False
        return await self.claims.settled(max(0.0, until - asyncio.get_running_loop().time()))

    # --- what operators see -----------------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why other instances do not get what they should, or nothing comes from them; None while all is well."""
        if any(task.done() for task in self._running):
            return "the shared log's tasks have ended; the log tells why, and only a restart helps"
        return self._troubles.first

    @property
    def behind(self) -> int:
        """Streams of which others cannot read everything yet."""
        return self._mirror.behind


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("shared log failed", exc_info=error)
