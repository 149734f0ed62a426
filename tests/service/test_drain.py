"""The shutdown sequence, against a server in this process; real processes get real signals in e2e/test_shutdown.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, cast

import pytest
from conftest import Server, eventually, prompt, serving
from raw import connected, request
from rawclient import RawClient, parse

from aisse.sse import HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

    from aisse.simulator import Simulator

ENDLESS = "[[tokens=100000 pace=50]]"
UNKNOWN = "A" * 22


@contextlib.asynccontextmanager
async def draining(server: Server, **arguments: Any) -> AsyncIterator[asyncio.Task[None]]:
    """The server's drain, under way; ended with the block."""
    task = asyncio.create_task(server.drain.run(**arguments))
    try:
        await eventually(lambda: server.registry.draining)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.registry.close()  # the runner's shutdown would drain what is left, and wait for it


async def asking(server: Server, text: str) -> RawClient:
    client = await RawClient.connect(server.address)
    await client.post(prompt(text))
    await client.answered()
    assert client.status == 200
    return client


async def answer(server: Server, what: bytes, method: str = "POST") -> Any:
    async with connected(server.address) as connection:
        await connection.send(what)
        return await connection.answer(method)


def told(client: RawClient) -> bool:
    """Whether it has been sent `reconnect`."""
    return bool(client.written.controls)


def resuming(path: str, **headers: str) -> bytes:
    return request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})


# --- readers ------------------------------------------------------------------------------------------------------


async def test_every_reader_is_told_once_between_frames_and_reads_on(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=600, reconnect_spread_s=4) as server:
        clients = [await asking(server, "[[tokens=60 pace=50]]") for _ in range(5)]
        async with draining(server) as drain:
            for client in clients:
                await client.read_to_end()
                assert client.body.ended
                written = client.written  # fails for a chunk that is not whole events
                (control,) = written.controls
                assert control.data["resume"] is False
                assert 0 <= control.retry_ms <= 4000
                assert 500_000 < control.data["deadline_ms"] <= 600_000
                assert set(control.data) == {"type", "resume", "deadline_ms"}
                assert control.data["type"] == "reconnect"
                assert [frame.seq for frame in written.frames] == list(range(1, len(written.frames) + 1))
                assert written.items.index(control) < len(written.items) - 1
                assert json.loads(written.frames[-1].data)["reason"] == "complete"
                client.close()
            await asyncio.wait_for(drain, 60)


async def test_reader_that_is_not_answered_yet_is_told_after_its_opening(simulator: Simulator) -> None:
    async with (
        serving(simulator.url, drain_s=600, first_byte_commit_s=60) as server,
        await RawClient.connect(server.address) as client,
    ):
        await client.post(prompt("[[first_s=0.5 tokens=3]]"))
        await eventually(lambda: server.registry.readers == 1)
        async with draining(server):
            await client.answered()
            await client.read_to_end()
        assert client.written.opening is not None
        assert len(client.written.controls) == 1
        assert client.written.frames[-1].event == "end"


async def test_reader_whose_socket_is_full_is_not_waited_for_and_told_once_it_reads(simulator: Simulator) -> None:
    async with (
        serving(simulator.url, drain_s=600) as server,
        await RawClient.connect(server.address, receive_buffer_bytes=16 << 10) as stalled,
        await asking(server, ENDLESS) as other,
    ):
        await stalled.post(prompt("[[tokens=2000 token_bytes=1000]]"))
        await stalled.answered()
        await eventually(lambda: server.registry.figures.buffered_bytes > 0)
        async with draining(server):
            await other.read_until(told)
            # It is told what still holds when it reads, which may be long after.
            assert not told(stalled)
            await stalled.read_until(told)
            assert stalled.written.frames


async def test_reader_of_a_silent_stream_is_told_without_another_event(simulator: Simulator) -> None:
    """It stands at the tail, where only the relay writes, and its own task waits for the stream."""
    async with (
        serving(simulator.url, drain_s=600, heartbeat_s=60) as server,
        await asking(server, "[[tokens=20 fault=stall at=5]]") as client,
    ):
        await client.read_until(lambda client: len(client.written.frames) >= 3)
        async with draining(server):
            await client.read_until(told)


async def test_reader_that_joins_while_draining_reads_on_and_is_told_to_stay(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=600) as server, await asking(server, ENDLESS) as first:
        await first.read_until(lambda client: len(client.written.frames) >= 3)
        frame = first.written.frames[1]
        stream_id = frame.id.partition(".")[0]
        async with draining(server), await RawClient.connect(server.address) as again:
            await again.get(f"/api/chat/{stream_id}?last_event_id={frame.id}")
            await again.answered()
            assert again.status == 200
            assert again.headers.get("connection") != "close"
            await again.read_until(lambda client: told(client) and len(client.written.frames) >= 3)
            assert again.written.opening == frame.id
            assert again.written.frames[0].seq == 3
            assert again.written.controls[0].data["resume"] is False


async def test_heartbeats_go_on_while_draining(simulator: Simulator) -> None:
    async with (
        serving(simulator.url, drain_s=600, heartbeat_s=1, first_byte_commit_s=0) as server,
        await RawClient.connect(server.address) as client,
    ):
        await client.post(prompt("[[first_s=60]]"))
        await client.answered()
        async with draining(server):
            await client.read_until(told)
            before = client.written.heartbeats
            await client.read_until(lambda client: client.written.heartbeats > before)


# --- requests that come late --------------------------------------------------------------------------------------


async def test_draining_server_is_live_but_not_ready_and_says_so(server: Server, client: aiohttp.ClientSession) -> None:
    server.registry.draining = True
    async with client.get(server.url + "/health") as response:
        assert (await response.json())["status"] == "draining"
    async with client.get(server.url + "/health/ready") as response:
        assert response.status == 503
        assert response.headers["Cache-Control"] == "no-store"
        assert await response.json() == {"status": "draining"}
    async with client.get(server.url + "/health/live") as response:
        assert response.status == 200
        # After the listener has closed, only a connection from before can ask.
        assert "Connection" not in response.headers


async def test_post_while_draining_is_503_with_retry_after_and_close(server: Server, simulator: Simulator) -> None:
    server.registry.draining = True
    body = json.dumps(prompt("hello")).encode()
    for headers in ({}, {"Idempotency-Key": "k"}, {"Prefer": "respond-async"}, {"Last-Event-ID": f"{UNKNOWN}.3"}):
        refusal = await answer(server, request("POST", "/api/chat", body, headers))
        assert refusal.status == 503
        assert int(refusal.headers["Retry-After"]) > 0
        assert refusal.headers["Connection"] == "close"
        assert refusal.headers["Aisse-Draining"] == "1"
        assert refusal.json()["error"]["type"] == "overloaded_error"
    assert simulator.stats.requests == 0


async def test_failure_of_a_started_generation_while_draining_is_not_taken_for_a_refusal(simulator: Simulator) -> None:
    """A proxy may send a refused request elsewhere; this one it must not."""
    async with serving(simulator.url, drain_s=600, first_byte_commit_s=60) as server:
        asked = asyncio.create_task(
            answer(server, request("POST", "/api/chat", json.dumps(prompt("[[first_s=0.5 status=529]]")).encode(), {}))
        )
        await eventually(lambda: server.registry.active_streams == 1)
        async with draining(server):
            refusal = await asked
        assert refusal.status == 503
        assert refusal.headers["Connection"] == "close"
        assert "Aisse-Draining" not in refusal.headers


async def test_request_whose_body_is_on_its_way_is_waited_for_with_nothing_else_to_wait_for(
    simulator: Simulator,
) -> None:
    what = request("POST", "/api/chat", json.dumps(prompt("hello")).encode())
    async with serving(simulator.url, drain_s=600) as server, connected(server.address) as connection:
        await connection.send(what[:-5])
        await eventually(lambda: server.registry._unanswered == 1)
        async with draining(server) as drain:
            await asyncio.sleep(0.05)
            assert not drain.done()
            await connection.send(what[-5:])
            assert (await connection.answer()).status == 503
            await asyncio.wait_for(drain, 60)


async def test_reader_that_comes_while_connections_are_still_taken_is_told_once_with_the_others(
    simulator: Simulator,
) -> None:
    async with serving(simulator.url, drain_s=600, unready_s=2) as server, await asking(server, ENDLESS) as first:
        path = first.headers["content-location"]
        closed = asyncio.Event()

        async def close_listener() -> None:
            closed.set()

        async with draining(server, close_listener=close_listener), await RawClient.connect(server.address) as second:
            await second.get(path)
            await second.answered()
            await second.read_until(lambda client: client.written.frames != [])
            assert not closed.is_set()
            assert not told(second)
            for client in (first, second):
                await client.read_until(told)
                # Whoever was told twice would be so within the next events.
                for _ in range(3):
                    await client.read()
                assert len(client.written.controls) == 1


async def test_post_that_joins_a_stream_of_this_server_still_does_while_draining(simulator: Simulator) -> None:
    body = json.dumps(prompt(ENDLESS)).encode()
    async with serving(simulator.url, drain_s=600) as server, await RawClient.connect(server.address) as first:
        await first.send(request("POST", "/api/chat", body, {"Idempotency-Key": "once"}))
        await first.answered()
        stream_id = first.headers["content-location"].rpartition("/")[2]
        async with draining(server):
            for headers in ({"Idempotency-Key": "once"}, {"Last-Event-ID": f"{stream_id}.1"}):
                async with await RawClient.connect(server.address) as again:
                    await again.send(request("POST", "/api/chat", body, headers))
                    await again.answered()
                    assert again.status == 200
                    await again.read_until(lambda client: client.written.frames != [])
        assert simulator.stats.requests == 1


@pytest.mark.parametrize("where", ["header", "query", "none"])
async def test_get_of_a_stream_that_is_elsewhere_is_told_to_come_back_and_cut_off(server: Server, where: str) -> None:
    server.registry.draining = True
    loop = asyncio.get_running_loop()
    cursor = f"{UNKNOWN}.7"
    path = f"/api/chat/{UNKNOWN}" + (f"?last_event_id={cursor}" if where == "query" else "")
    async with await RawClient.connect(server.address) as client:
        await client.send(resuming(path, **({"Last_Event_ID": cursor} if where == "header" else {})))
        await client.answered()
        assert client.status == 200
        assert client.headers["content-type"] == "text/event-stream"
        assert client.headers.get("connection") != "close"
        await client.read_until(told)
        since = loop.time()
        await client.read_to_end()
        assert loop.time() - since > 0.9
        assert client.broken
        assert not client.body.ended
        (chunk,) = client.body.chunks
        written = parse(chunk)
        assert written.opening == (cursor if where != "none" else None)
        assert written.controls[0].data["resume"] is True
        assert written.items == written.controls
        assert HEARTBEAT not in chunk


@pytest.mark.parametrize(
    ("path", "accept", "status"),
    [
        (f"/api/chat/{UNKNOWN}", "application/json", 404),
        ("/api/chat/short", "text/event-stream", 404),
        (f"/api/chat/{UNKNOWN[:-2]}%0d%0a", "text/event-stream", 404),
        (f"/api/chat/{UNKNOWN}?last_event_id=B", "text/event-stream", 400),
        (f"/api/chat/{UNKNOWN}?last_event_id={'B' * 22}.1", "text/event-stream", 400),
    ],
)
async def test_get_that_no_event_source_sends_is_refused_as_ever(
    server: Server, path: str, accept: str, status: int
) -> None:
    server.registry.draining = True
    refusal = await answer(server, resuming(path, Accept=accept), "GET")
    assert refusal.status == status
    assert refusal.headers["Connection"] == "close"


async def test_get_at_the_end_of_a_finished_stream_is_204_while_draining(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=600) as server, await asking(server, "[[tokens=2]]") as client:
        await client.read_to_end()
        cursor = client.written.frames[-1].id
        server.registry.draining = True
        path = f"/api/chat/{cursor.partition('.')[0]}"
        assert (await answer(server, resuming(path, Last_Event_ID=cursor), "GET")).status == 204


# --- the end ------------------------------------------------------------------------------------------------------


async def test_streams_that_run_at_the_deadline_end_as_shutdown_and_their_readers_get_it(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=0.3) as server:
        clients = [await asking(server, ENDLESS) for _ in range(3)]
        await server.drain.run()
        assert server.registry.active_streams == 0
        assert server.registry.readers == 0
        for client in clients:
            await client.read_to_end()
            assert client.body.ended
            assert len(client.written.controls) == 1
            assert json.loads(client.written.frames[-1].data)["reason"] == "shutdown"
            client.close()
        await eventually(lambda: simulator.stats.active == 0)


async def test_reader_that_takes_nothing_is_cut_off_after_the_deadline_and_not_ended(simulator: Simulator) -> None:
    async with (
        serving(simulator.url, drain_s=0.2, stall_s=600) as server,
        await RawClient.connect(server.address, receive_buffer_bytes=16 << 10) as stalled,
    ):
        await stalled.post(prompt("[[tokens=4000 token_bytes=1000]]"))
        await stalled.answered()
        await eventually(lambda: server.registry.figures.buffered_bytes > 0)
        # stall_s is what it must not wait for.
        await asyncio.wait_for(server.drain.run(), 60)
        assert server.registry.readers == 0
        await stalled.read_to_end()
        assert not stalled.body.ended


async def test_reader_that_has_taken_nothing_before_the_end_gets_no_time_for_its_last_bytes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than the test waits for, and less than stall_s.
    monkeypatch.setattr("aisse.service.drain._LAST_BYTES_S", 100.0)

    class Stalled:
        def tell(self, _control: bytes) -> None:
            pass

        def stalled_for(self, _now: float) -> float:
            return 100.0

        def beat(self, *_: object) -> bool:
            return False

        def evict(self) -> None:
            reading.close()

    with contextlib.ExitStack() as reading:
        reading.enter_context(server.registry.reading(cast("Any", Stalled())))
        await asyncio.wait_for(server.drain.run(), 60)
    assert server.registry.readers == 0


async def test_drain_ends_with_the_last_stream_and_not_with_the_deadline(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=600) as server, await asking(server, "[[tokens=20 pace=50]]") as client:
        task = asyncio.create_task(server.drain.run())
        await client.read_to_end()
        async with asyncio.timeout(60):
            await task


async def test_drain_that_is_asked_for_again_is_the_same_one(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=600) as server, await asking(server, "[[tokens=30 pace=50]]") as client:
        first, second = (asyncio.create_task(server.drain.run()) for _ in range(2))
        await client.read_to_end()
        async with asyncio.timeout(60):
            await asyncio.gather(first, second)
            await server.drain.run()
        assert len(client.written.controls) == 1


async def test_unready_time_passes_before_the_listener_closes_and_counts_before_the_deadline(
    simulator: Simulator,
) -> None:
    order: list[str] = []
    async with serving(simulator.url, unready_s=0.3, drain_s=1.5) as server, await asking(server, ENDLESS) as client:
        begun = asyncio.get_running_loop().time()

        async def close_listener() -> None:
            assert asyncio.get_running_loop().time() >= begun + 0.29  # the loop counts in milliseconds
            assert server.registry.draining
            assert server.registry.active_streams == 1
            order.append("closed")

        await server.drain.run(close_listener)
        assert asyncio.get_running_loop().time() >= begun + 1.79
        assert order == ["closed"]
        await client.read_to_end()
        # Told only once the listener is closed: who came back at once would have come back here.
        assert 0 < client.written.controls[0].data["deadline_ms"] <= 1500


async def test_request_on_its_way_when_the_listener_closes_is_answered(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing else to wait for, too: its connection was accepted, and is nobody's to close over it."""
    monkeypatch.setattr("aisse.service.drain._RACING_S", 2.0)  # more than a busy machine takes for the answer
    async with serving(simulator.url, drain_s=600) as server, connected(server.address) as connection:
        closed = asyncio.Event()

        async def close_listener() -> None:
            closed.set()

        drain = asyncio.create_task(server.drain.run(close_listener))
        await closed.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        await connection.send(request("POST", "/api/chat", json.dumps(prompt("hello")).encode()))
        answered = asyncio.create_task(connection.answer())
        await asyncio.wait({answered, drain}, return_when=asyncio.FIRST_COMPLETED)
        assert not drain.done()
        assert (await answered).status == 503
        await asyncio.wait_for(drain, 60)


async def test_no_time_passes_where_nothing_runs_and_no_listener_is_left_to_close(simulator: Simulator) -> None:
    async with serving(simulator.url, unready_s=600, drain_s=600) as server, asyncio.timeout(60):
        await server.drain.run()


async def test_progress_is_reported_until_nothing_is_left(simulator: Simulator) -> None:
    said: list[tuple[int, int, float]] = []
    async with (
        serving(simulator.url, drain_s=600) as server,
        await asking(server, "[[tokens=40 pace=20]]") as client,
        draining(server, report=lambda *left: said.append(left)) as drain,
    ):
        await client.read_to_end()
        await asyncio.wait_for(drain, 60)
    assert said[0][:2] == (1, 1)
    assert said[-1][:2] == (0, 0)
    assert 500 < said[-1][2] < said[0][2] < 600


async def test_progress_that_nobody_else_shows_is_logged(
    simulator: Simulator, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(simulator.url, drain_s=600) as server, await asking(server, "[[tokens=40 pace=20]]") as client:
        drain = asyncio.create_task(server.drain.run())
        await client.read_to_end()
        await drain
    assert re.search(r"draining .*left_s=5\d\d\.\d.* readers=1.* streams=1", capsys.readouterr().out)


async def test_cancelled_drain_leaves_streams_to_close(simulator: Simulator) -> None:
    async with serving(simulator.url, drain_s=600) as server, await asking(server, ENDLESS):
        drain = asyncio.create_task(server.drain.run())
        await eventually(lambda: server.registry.draining)
        drain.cancel()
        await asyncio.gather(drain, return_exceptions=True)
        assert server.registry.active_streams == 1
        await server.registry.close()
        assert server.registry.active_streams == 0
