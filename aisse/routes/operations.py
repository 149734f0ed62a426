"""Health, for people, load balancers and supervisors."""

from __future__ import annotations

import os
import resource
import sys
from typing import TYPE_CHECKING

from aiohttp import web

import aisse
from aisse.settings import log_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from aisse.settings import Settings
    from aisse.streams.registry import Registry


def routes(
    settings: Settings,
    registry: Registry,
    upstream_name: str,
    uptime_s: Callable[[], float],
    log_lines_dropped: Callable[[], int] = lambda: 0,
) -> list[web.RouteDef]:
    """`/health`, `/health/live`, `/health/ready`."""

    async def health(_request: web.Request) -> web.Response:
        troubles = registry.figures.troubles()
        stalled, oldest_s = registry.figures.stalls()
        body: dict[str, object] = {
            "status": "draining" if registry.draining else "degraded" if troubles else "healthy",
            "activeStreams": registry.active_streams,
            "totalRequests": registry.generations,
            "failedRequests": registry.figures.failed,
            "totalTokens": registry.figures.output_tokens,
            "uptimeSeconds": int(uptime_s()),
            "memoryMB": round(resident_bytes() / (1 << 20)),
            "tokensPerSecond": round(registry.figures.tokens_per_second(), 1),
            "readers": registry.readers,
            "stalledReaders": stalled,
            "oldestStallSeconds": round(oldest_s, 1),
            "bufferedBytes": registry.figures.buffered_bytes,
            "replayBytes": registry.replay_bytes,
            "bodiesBytes": registry.bodies.used,
            "eventLoopLagMs": round(registry.figures.loop_lag_s * 1000, 1),
            "logLinesDropped": log_lines_dropped(),
            "log": log_kind(settings),
            "upstream": upstream_name,
            "version": aisse.__version__,
        }
        if troubles:
            body["reasons"] = troubles
        return web.json_response(body, headers=_UNCACHED)

    async def live(_request: web.Request) -> web.Response:
        return web.json_response({"status": "live"}, headers=_UNCACHED)

    async def ready(_request: web.Request) -> web.Response:
        if registry.draining:
            return web.json_response({"status": "draining"}, status=503, headers=_UNCACHED)
        return web.json_response({"status": "ready"}, headers=_UNCACHED)

    return [web.get("/health", health), web.get("/health/live", live), web.get("/health/ready", ready)]


_UNCACHED = {"Cache-Control": "no-store"}


def resident_bytes() -> int:
    """The process's resident memory; its peak where the system does not tell the present."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read often; no path is built
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
