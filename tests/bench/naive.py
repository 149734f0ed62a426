"""The relay that everybody writes first: what aisse is measured against. Fair: uvloop, no limits, no access log."""

import asyncio
import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

UPSTREAM = sys.argv[1] + "/v1/messages"


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json() | {"model": "bench", "max_tokens": 4096, "stream": True}
    async with request.app[SESSION].post(UPSTREAM, json=body) as answer:
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        return response


SESSION = web.AppKey("session", ClientSession)


async def serve() -> None:
    app = web.Application()
    app.router.add_post("/api/chat", chat)
    connector = TCPConnector(limit=0)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as app[SESSION]:
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        sys.stdout.write(f"http://127.0.0.1:{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
