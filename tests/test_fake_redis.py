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

from aisse.replay.follower_scripts import AskToStop, Attend, Bury, Look, ReadHere
from aisse.replay.producer_scripts import Append, Claim, Create, Group, NewStream, Renew, Withdraw
from aisse.replay.scripts import Script, StreamKeys, instance_key

if TYPE_CHECKING:
    from collections.abc import Callable

SOAK = os.environ.get("TESTS_SOAK") == "1"

# Times that both tell may differ by as much as the two calls are apart, on a busy machine.
APART_MS = 30_000
LONG_MS = 3_600_000

# A script, or the parts of a command.
Call = Script[Any] | tuple[Any, ...]

STREAMS = ["a" * 22, "a" + "b" * 21]
KEYS = {stream_id: StreamKeys(stream_id) for stream_id in STREAMS}
DIGESTS = ["a1", "a2"]
stream = st.sampled_from([STREAMS[0], *STREAMS])
token = st.sampled_from(["t1", "t1", "t1", "t2"])
ends = st.sampled_from([False, False, False, True])
seq = st.integers(0, 4)
# Long leases, or ones that have lapsed long ago: what is between depends on the moment.
lease_ms = st.sampled_from([LONG_MS, -LONG_MS])
digest = st.sampled_from(DIGESTS)
some = st.lists(stream, min_size=1, max_size=2, unique=True)


def of_some(values: Callable[[str], st.SearchStrategy[Any]]) -> st.SearchStrategy[list[Any]]:
    """A list with the value of each of some streams."""
    return some.flatmap(lambda ids: st.tuples(*map(values, ids)).map(list))


NewStreams = of_some(
    lambda each: st.builds(NewStream, st.just(each), st.just(0.005), st.none() | digest.map(lambda key: (key, "d")))
)
# What comes after the last frame that is there, as most does, or after another one.
BEFORE_LAST = -1
Groups = of_some(
    lambda each: st.builds(
        lambda before, more, ends, frames: Group(KEYS[each], before, before + more, ends, frames),
        st.sampled_from([BEFORE_LAST, BEFORE_LAST, BEFORE_LAST, 0, 3]),
        st.integers(0, 2),
        ends,
        st.binary(),
    )
)
ReadHeres = of_some(
    lambda each: st.builds(
        ReadHere,
        st.just(KEYS[each]),
        st.booleans(),
        st.integers(0, 9999),
        st.sampled_from([0, 0, LONG_MS, 2 * LONG_MS]),
        st.booleans(),
    )
)


def resolved(call: Call, store: Store) -> Call:
    """With the numbers that fit to what is there."""
    if not isinstance(call, Append):
        return call
    groups = []
    for group in call.groups:
        if group.before == BEFORE_LAST:
            last = int(store.execute(b"HGET", group.keys.state, b"last") or 0)
            group = group._replace(before=last, last=last + group.last - BEFORE_LAST)  # noqa: PLW2901
        groups.append(group)
    return Append(call.token, call.keep_ms, groups)


# Most calls do something only where there is a stream.
THERE = Create("t1", LONG_MS, LONG_MS, LONG_MS, [NewStream(STREAMS[0], 0.005, None)])

calls = st.one_of(
    st.builds(lambda token, lease_ms, new: Create(token, lease_ms, LONG_MS, LONG_MS, new), token, lease_ms, NewStreams),
    *[st.builds(lambda token, groups: Append(token, LONG_MS, groups), token, Groups)] * 2,
    *[st.builds(lambda token, told: Attend(token, LONG_MS, told), token, ReadHeres)] * 2,
    *[
        st.builds(
            lambda token, lease_ms, ids: Renew(token, lease_ms, LONG_MS, [KEYS[each] for each in ids]),
            *(token, lease_ms, some),
        )
    ]
    * 2,
    st.builds(
        lambda each, last, latest_ms: Bury(KEYS[each], last, last + 10**9, b"end", LONG_MS, latest_ms),
        *(stream, seq, st.sampled_from([0, LONG_MS * 10**6])),
    ),
    st.builds(lambda kind, ids: kind("t1", ids), st.sampled_from([Look, AskToStop]), some),
    st.builds(
        lambda key, each, request, token, lease_ms: Claim(key, each, request, token, lease_ms, LONG_MS, LONG_MS, 0.007),
        *(digest, stream, st.sampled_from(["d", "e"]), token, lease_ms),
    ),
    st.builds(lambda each, key: Withdraw(each, key, LONG_MS, LONG_MS, 9, b"end"), stream, st.none() | digest),
    st.builds(lambda: ("PEXPIRE", instance_key("t1"), LONG_MS)),
    st.builds(lambda: ("SET", instance_key("t1"), 1, "PX", LONG_MS)),
    st.builds(lambda each, after: ("XRANGE", KEYS[each].entries, f"({after}-0", "+", "COUNT", 2), stream, seq),
    st.builds(lambda each: ("XREVRANGE", KEYS[each].entries, "+", "-", "COUNT", 1), stream),
    st.builds(
        lambda ids, after: (
            *("XREAD", "COUNT", 2, "STREAMS"),
            *(KEYS[each].entries for each in ids),
            *[f"{after}-0"] * len(ids),
        ),
        some,
        seq,
    ),
)


def asked(store: Store, call: Call) -> Any:
    def raw(value: object) -> bytes:
        return value if isinstance(value, bytes) else str(value).encode()

    try:
        if isinstance(call, Script):
            keys, args = call.keys(), call.args()
            sha = store.execute(b"SCRIPT", b"LOAD", call.LUA.encode())
            return store.execute(b"EVALSHA", sha, raw(len(keys)), *keys, *map(raw, args))
        return store.execute(*map(raw, call))
    except RefusedError as error:
        return str(error).partition(" ")[0]


async def really_asked(client: Redis, call: Call) -> Any:
    try:
        if isinstance(call, Script):
            return await client.eval(call.LUA, len(call.keys()), *call.keys(), *call.args())
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
                if isinstance(call, Script) and ours != "WITHDRAWN":
                    call.read(ours)
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
