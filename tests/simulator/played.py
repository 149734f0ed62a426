"""What a stream in the Anthropic format has in it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aisse.simulator import Script


def events(stream: bytes) -> list[dict[str, Any]]:
    """The data of each event of a stream as the real API writes it, to the byte."""
    assert stream.endswith(b"\n\n")
    found = []
    for frame in stream[:-2].decode().split("\n\n"):
        match = re.fullmatch(r"event: (\w+)\ndata: (.+)", frame)
        assert match, frame
        data = json.loads(match[2])
        assert data["type"] == match[1]
        found.append(data)
    return found


def types(stream: bytes) -> list[str]:
    return [event["type"] for event in events(stream)]


def text_of(stream: bytes, kind: str = "text") -> str:
    deltas = [event["delta"] for event in events(stream) if event["type"] == "content_block_delta"]
    return "".join(delta[kind] for delta in deltas if delta["type"] == f"{kind}_delta")


def played(script: Script, max_tokens: int | None = None) -> bytes:
    return b"".join(frame for _, frame in script.frames(max_tokens=max_tokens))
