"""The Redis inside the test against a real one: to the same calls the same answers, and then the same data."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from fake_redis import RefusedError, Status, Store
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import exceptions
from redis.asyncio import Redis
from redis_server import binaries, redis_server, required

from aisse.replay import scripts
from aisse.replay.scripts import claim_key, entries_key, instance_key, readers_key, state_key, withdrawn_key

if TYPE_CHECKING:
    from collections.abc import Sequence

SOAK = os.environ.get("TESTS_SOAK") == "1"

# Times that both tell may differ by as much as the two calls are apart, on a busy machine.
APART_MS = 30_000
LONG_MS = 3_600_000

Call = tuple[Any, ...]

STREAMS = ["a" * 22, "a" + "b" * 21]
DIGESTS = ["a1", "a2"]
stream = st.sampled_from([STREAMS[0], *STREAMS])
token = st.sampled_from(["t1", "t1", "t1", "t2"])
ends = st.sampled_from([0, 0, 0, 1])
seq = st.integers(0, 4)
# Long leases, or ones that have lapsed long ago: what is between depends on the moment.
lease_ms = st.sampled_from([LONG_MS, -LONG_MS])
digest = st.sampled_from(DIGESTS)
some = st.lists(stream, min_size=1, max_size=2, unique=True)


def evaluate(script: str, keys: Sequence[str], *args: object) -> Call:
    return "EVAL", script, keys, args


@st.composite
def created(draw: st.DrawFn) -> Call:
    keys: list[str] = []
    args: list[object] = [draw(token), draw(lease_ms), LONG_MS, LONG_MS]
    for each in draw(some):
        key = draw(st.sampled_from([None, *DIGESTS]))
        keys += (state_key(each), entries_key(each), withdrawn_key(each))
        keys.append(claim_key(key) if key else state_key(each))
        args += (each, 5, "d" if key else "")
    return evaluate(scripts.CREATE, keys, *args)


@st.composite
def appended(draw: st.DrawFn) -> Call:
    """What comes after the last frame that is there, as most does, or after another one."""
    groups = [
        (each, draw(st.sampled_from([None, None, None, 0, 3])), draw(st.integers(0, 2)), draw(ends), draw(st.binary()))
        for each in draw(some)
    ]
    return "APPEND", draw(token), groups


def resolved(call: Call, store: Store) -> Call:
    if call[0] != "APPEND":
        return call
    keys: list[str] = []
    args: list[object] = [call[1], LONG_MS]
    for each, before, more, end, frames in call[2]:
        keys += (state_key(each), entries_key(each))
        last = int(store.execute(b"HGET", state_key(each).encode(), b"last") or 0) if before is None else before
        args += (last, last + more, end, frames)
    return evaluate(scripts.APPEND, keys, *args)


@st.composite
def attended(draw: st.DrawFn) -> Call:
    keys: list[str] = []
    args: list[object] = [draw(token), LONG_MS]
    for each in draw(some):
        keys += (state_key(each), readers_key(each))
        args += (draw(st.integers(0, 1)), draw(st.integers(0, 9999)))
        args += (draw(st.sampled_from([0, 0, LONG_MS, 2 * LONG_MS])), draw(st.integers(0, 1)))
    return evaluate(scripts.ATTEND, keys, *args)


def renewed(token: str, lease_ms: int, some: list[str]) -> Call:
    keys = [key for each in some for key in (state_key(each), entries_key(each), readers_key(each))]
    return evaluate(scripts.RENEW, keys, token, lease_ms, LONG_MS)


def buried(stream: str, last: int, in_time: bool) -> Call:
    latest = LONG_MS * 10**6 if in_time else 0
    return evaluate(scripts.BURY, [state_key(stream), entries_key(stream)], last, last + 10**9, "end", LONG_MS, latest)


def looked(script: str, some: list[str]) -> Call:
    return evaluate(script, [instance_key("t1"), *map(state_key, some)])


def claimed(digest: str, stream: str, request: str, token: str, lease_ms: int) -> Call:
    keys = [claim_key(digest), state_key(stream), withdrawn_key(stream)]
    prefix = entries_key(stream).removesuffix(stream)
    return evaluate(scripts.CLAIM, keys, prefix, stream, request, token, lease_ms, LONG_MS, LONG_MS, 7)


def withdrawn(stream: str, digest: str | None) -> Call:
    keys = [state_key(stream), entries_key(stream), withdrawn_key(stream)] + ([claim_key(digest)] if digest else [])
    return evaluate(scripts.WITHDRAW, keys, stream, LONG_MS, LONG_MS, 9, "end")


# Most calls do something only where there is a stream.
THERE = evaluate(
    scripts.CREATE,
    [state_key(STREAMS[0]), entries_key(STREAMS[0]), withdrawn_key(STREAMS[0]), state_key(STREAMS[0])],
    *("t1", LONG_MS, LONG_MS, LONG_MS, STREAMS[0], 5, ""),
)

calls = st.one_of(
    created(),
    appended(),
    appended(),
    attended(),
    attended(),
    st.builds(renewed, token, lease_ms, some),
    st.builds(renewed, token, lease_ms, some),
    st.builds(buried, stream, seq, st.booleans()),
    st.builds(looked, st.sampled_from([scripts.LOOK, scripts.STOP_ASKED]), some),
    st.builds(claimed, digest, stream, st.sampled_from(["d", "e"]), token, lease_ms),
    st.builds(withdrawn, stream, st.none() | digest),
    st.builds(lambda: ("PEXPIRE", instance_key("t1"), LONG_MS)),
    st.builds(lambda: ("SET", instance_key("t1"), 1, "PX", LONG_MS)),
    st.builds(lambda each, after: ("XRANGE", entries_key(each), f"({after}-0", "+", "COUNT", 2), stream, seq),
    st.builds(lambda each: ("XREVRANGE", entries_key(each), "+", "-", "COUNT", 1), stream),
    st.builds(
        lambda some, after: ("XREAD", "COUNT", 2, "STREAMS", *map(entries_key, some), *[f"{after}-0"] * len(some)),
        some,
        seq,
    ),
)


def asked(store: Store, call: Call) -> Any:
    def raw(value: object) -> bytes:
        return value if isinstance(value, bytes) else str(value).encode()

    try:
        if call[0] == "EVAL":
            _, script, keys, args = call
            sha = store.execute(b"SCRIPT", b"LOAD", script.encode())
            return store.execute(b"EVALSHA", sha, raw(len(keys)), *map(raw, keys), *map(raw, args))
        return store.execute(*map(raw, call))
    except RefusedError as error:
        return str(error).partition(" ")[0]


async def really_asked(client: Redis, call: Call) -> Any:
    try:
        if call[0] == "EVAL":
            _, script, keys, args = call
            return await client.eval(script, len(keys), *keys, *args)
        connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_command(*call)
            return await connection.read_response()
        finally:
            await client.connection_pool.release(connection)
    except exceptions.ResponseError as error:
        return str(error).partition(" ")[0]


def alike(ours: Any, real: Any) -> bool:
    """Also where they are times, which pass."""
    if isinstance(ours, list) and isinstance(real, list):
        return len(ours) == len(real) and all(map(alike, ours, real))
    if isinstance(ours, Status):
        return bool(ours.encode() == real)
    if (
        ours != real
        and type(ours) is type(real)
        and str(ours).strip("b'-").isdigit()
        and str(real).strip("b'-").isdigit()
    ):
        return abs(int(ours)) > APART_MS and abs(int(ours) - int(real)) < APART_MS
    return bool(ours == real)


async def held_by(store: Store, client: Redis) -> None:
    """Both have the same, for as long."""
    keys = sorted(store.keys())
    assert keys == sorted(await client.keys())
    for key in keys:
        ours = store._data[key]
        match await client.type(key):
            case b"hash":
                real: Any = await client.hgetall(key)
                assert real.keys() == ours.keys()
                assert all(alike(ours[name], real[name]) for name in real), (key, ours, real)
            case b"zset":
                assert set(await client.zrange(key, 0, -1)) == ours.keys()
            case b"stream":
                last = (await client.xinfo_stream(key))["last-generated-id"]
                assert last == b"%d-%d" % store.last_id(key)
        left, real_left = store.left_ms(key), await client.pttl(key)
        assert real_left != -1 if left is not None else real_left == -1, key
        assert left is None or abs(left - real_left) < APART_MS


@pytest.mark.parametrize("engine", list(binaries()))
def test_scripts_do_inside_the_test_what_they_do_in_a_server(engine: str) -> None:
    with asyncio.Runner() as runner:
        server = redis_server(required(engine))
        running = runner.run(server.__aenter__())
        client = Redis.from_url(running.url, protocol=2)

        async def both(sequence: list[Call]) -> None:
            await client.flushall()
            store = Store(time.time)
            for call in [THERE, *sequence]:
                call = resolved(call, store)  # noqa: PLW2901 - it depends on what is there
                ours, real = asked(store, call), await really_asked(client, call)
                assert alike(ours, real), (call, ours, real)
            await held_by(store, client)

        @settings(max_examples=2000 if SOAK else 100)
        @given(st.lists(calls, min_size=10, max_size=40))
        def same(sequence: list[Call]) -> None:
            runner.run(both(sequence))

        try:
            same()
        finally:
            runner.run(client.aclose())
            runner.run(server.__aexit__(None, None, None))


def test_keys_are_gone_after_their_time() -> None:
    now = 100.0
    store = Store(lambda: now)
    store.execute(b"SET", b"key", b"1", b"PX", b"500")
    store.execute(b"HSET", b"hash", b"name", b"text")
    assert (store.execute(b"PEXPIRE", b"hash", b"400"), store.execute(b"PEXPIRE", b"none", b"400")) == (1, 0)
    now = 100.399
    assert sorted(store.keys()) == [b"hash", b"key"]
    now = 100.4
    assert store.execute(b"HGET", b"hash", b"name") is None
    assert store.execute(b"EXISTS", b"key", b"hash") == 1
    now = 100.5
    assert not store.keys()
