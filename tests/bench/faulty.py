"""A relay that is wrong on purpose: every stream loses, doubles or swaps one token. It shows that the benchmark sees.

Usage: faulty.py UPSTREAM lose|double|swap
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, StreamReader, web

_UPSTREAM, _FAULT = sys.argv[1] + "/v1/messages", sys.argv[2]
_AT = 4  # the frame at fault: the third token, two opening frames come first


async def chat(request: web.Request) -> web.StreamResponse:
    async with (
        ClientSession(timeout=ClientTimeout(total=None)) as session,
        session.post(_UPSTREAM, json=await request.json()) as answer,
    ):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        held = b""
        async for number, frame in _frames(answer.content):
            if number == _AT and _FAULT == "swap":
                held = frame
            elif number != _AT or _FAULT == "double":
                await response.write((frame + frame if number == _AT else frame) + held)
                held = b""
        return response


async def _frames(content: StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    number, lines = 0, b""
    async for line in content:
        lines += line
        if line == b"\n":
            yield number, lines
            number, lines = number + 1, b""


async def serve() -> None:
    app = web.Application()
    app.router.add_post("/api/chat", chat)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"http://127.0.0.1:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
