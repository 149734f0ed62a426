"""Upstreams that answer, and clients that ask them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Any

import trustme
from conftest import Server, prompt
from rawupstream import LAST_CHUNK, MESSAGE_STOP, Connection, Request, chunk, delta, head, message_delta, message_start

from aisse.formats.anthropic import Anthropic
from aisse.settings import Settings
from aisse.upstream.client import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import aiohttp
    import pytest

OWN = "own-key-7a8b9c"

ANSWER = [message_start(), delta("Hello"), message_delta(), MESSAGE_STOP]


async def answer(request: Request, connection: Connection) -> None:
    connection.send(head(), *map(chunk, ANSWER), LAST_CHUNK)


async def ask(
    client: aiohttp.ClientSession, server: Server, text: str = "anything"
) -> tuple[int, Mapping[str, str], str]:
    async with asyncio.timeout(60), client.post(server.chat, json=prompt(text)) as response:
        return response.status, response.headers, await response.text()


@contextlib.asynccontextmanager
async def started(url: str, **settings: Any) -> AsyncIterator[Upstream]:
    effective = Settings(**settings)
    upstream = Upstream(url, effective, Anthropic(effective), key=OWN)
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.close()


def closing(at: int, *sent: bytes, how: str = "fin", before: int = 1) -> Any:
    """An upstream that answers the first `before` requests of its connection number `at`, and then closes it."""
    numbers: dict[Connection, int] = {}

    async def serve(request: Request, connection: Connection) -> None:
        number = numbers.setdefault(connection, len(numbers))
        if number != at or connection.requests <= before:
            await answer(request, connection)
            return
        connection.send(*sent)
        connection.rst() if how == "rst" else connection.fin()

    return serve


def server_side(
    monkeypatch: pytest.MonkeyPatch, name: str = "127.0.0.1", *, trusted: bool = True, **options: Any
) -> ssl.SSLContext:
    authority = trustme.CA()
    client = ssl.create_default_context()
    if trusted:
        authority.configure_trust(client)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", client)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, **options).configure_cert(server)
    return server
