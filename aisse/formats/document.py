"""JSON as formats need it: the fields of a question, checked by a table, and what an event's data says.

Nothing of a question that is passed on becomes Python objects, which would take a hundred times as long. msgspec finds
where each value begins and ends (`Raw`), and the bytes between the two go out as they came. It passes over every byte
of them, so that what is no JSON is refused, and no value can close the object that is built around it. It does not
look whether they are UTF-8: `routes/intake` does.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Raw
from msgspec.json import Decoder

from aisse.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Check = Callable[[memoryview, str], object]
    """Looks at a value and is told the name of its field. Raises RequestError (400) where the value is wrong."""

# A question that is no longer than this is sent in one piece, and is checked without letting others run in between.
_SMALL_BYTES = 64 << 10

_MOMENT_S = 0.001

# A name or a number that is longer than this is wrong, and is not decoded to find out.
SCALAR_BYTES = 1024

# The first byte of a value shows its kind. Whether the value is whole has been seen before.
STARTS = {"an object": ord("{"), "a list": ord("["), "a string": ord('"')}
_NULL = ord("n")

ABSENT = Raw(b"")

_LIST = Decoder(list[Raw])

Scalar = TypeVar("Scalar")


class Document:
    """The fields that a question may have, and how each is checked.

    `checks` has a check for each field, or None for one that its format checks by itself. `opened` are further fields
    that the operator allows; they are passed on unchecked.
    """

    def __init__(self, checks: Mapping[str, Check | None], opened: Iterable[str]) -> None:
        self._checks = checks
        names = list(dict.fromkeys((*checks, *opened)))
        # Names of its own: a field that an operator opens need not be an identifier.
        inner = [f"f{number}" for number in range(len(names))]
        document = msgspec.defstruct(
            "Document",
            [(name, Raw, ABSENT) for name in inner],
            rename=dict(zip(inner, names, strict=True)),
            forbid_unknown_fields=True,
            frozen=True,
            gc=False,
        )
        self._decoder = Decoder(document)
        self._keys = {name: b"," + json.dumps(name).encode() + b":" for name in names}

    async def read(self, body: bytes | bytearray, turns: Turns) -> dict[str, memoryview]:
        """The fields that `body` has, in the table's order, all of them checked. Raises RequestError (400).

        A field that is null counts as absent. Of a field that is given twice the last counts.
        """
        values = self._values(body)
        await turns.took(len(body))
        for name, value in values.items():
            if (check := self._checks.get(name)) is not None:
                check(value, name)
                await turns.took(len(value))
        return values

    def _values(self, body: bytes | bytearray) -> dict[str, memoryview]:
        try:
            document = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise named(error, "") from None
        except msgspec.DecodeError as error:
            # It says where the JSON broke, as a position in bytes, and quotes nothing.
            said = str(error).removeprefix("JSON is malformed: ")
            if said == "Input data was truncated":
                # It says the same of half an emoji, which JavaScript makes where it cuts a text.
                said = "it ends too soon, or has half of a surrogate pair, such as \\ud83d alone"
            raise invalid("body", f"Invalid JSON: {said}") from None
        except RecursionError:
            raise invalid("body", "Invalid JSON: it is nested too deeply") from None
        return {
            name: value
            for name, raw in zip(self._keys, msgspec.structs.astuple(document), strict=True)
            if raw is not ABSENT and (value := memoryview(raw))[0] != _NULL
        }

    def join(
        self, head: Sequence[bytes | memoryview], values: Mapping[str, memoryview], turns: Turns
    ) -> tuple[bytes | memoryview, ...]:
        """The object that begins with `head` and goes on with the fields in `values`, as pieces that follow each other.

        A small one is a single piece. The text of a large one is not copied.
        """
        pieces = list(head)
        for name, value in values.items():
            pieces += self._keys[name], value
        pieces.append(b"}")
        return (b"".join(pieces),) if turns.small else tuple(pieces)


class Turns:
    """Lets others run between one pass over many bytes and the next.

    After a long pass that is for a moment. To answer a request takes several turns of the event loop, and in each of
    them this would otherwise be back with its next pass.
    """

    def __init__(self, size: int) -> None:
        self.small = size <= _SMALL_BYTES
        """Whether all of the `size` bytes are checked in one go."""
        self._bytes = 0

    async def took(self, size: int) -> None:
        """A pass over so many bytes was made."""
        if self.small:
            return
        self._bytes += size
        if self._bytes > _SMALL_BYTES:
            self._bytes = 0
            await asyncio.sleep(_MOMENT_S if size > _SMALL_BYTES else 0)


# --- checks ---------------------------------------------------------------------------------------------------


def check_object(value: memoryview, field: str) -> None:
    """It must be an object; what is in it is the upstream's to judge."""
    check_start(value, field, "an object")


def check_string(value: memoryview, field: str) -> None:
    """It must be a string, of any length."""
    check_start(value, field, "a string")


def check_start(value: memoryview, field: str, kind: str) -> None:
    """It must be of a `kind` that STARTS has."""
    if value[0] != STARTS[kind]:
        raise invalid(field, f"must be {kind}")


def check_items(value: memoryview, field: str, kind: str, at_most: int, *, at_least: int = 0) -> None:
    """It must be a list of so many items, all of a `kind` that STARTS has."""
    check_start(value, field, "a list")
    items = _LIST.decode(value)
    check_count(len(items), field, at_least, at_most)
    for index, item in enumerate(items):
        check_start(memoryview(item), f"{field}.{index}", kind)


def check_count(count: int, field: str, at_least: int, at_most: int) -> None:
    """It must have so many items; `at_least` is 0 or 1."""
    if count < at_least:
        raise invalid(field, "must not be empty")
    if count > at_most:
        raise invalid(field, f"must have at most {at_most} items")


def scalar(decoder: Decoder[Scalar], value: memoryview, field: str) -> Scalar:
    """The name or the number that `decoder` finds in a value."""
    if len(value) > SCALAR_BYTES:
        raise invalid(field, "is too long")
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str`": it names types, and quotes nothing.
        raise invalid(field, str(error)) from None


# --- errors ---------------------------------------------------------------------------------------------------

_AT = re.compile(r"(.*?)(?: - at `\$\[(\d+)\]`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


def named(error: msgspec.ValidationError, field: str) -> RequestError:
    """What msgspec says of the document, or of the list in its `field`, with the name that clients have for it."""
    match = _AT.fullmatch(str(error))
    assert match is not None
    message, index = match.groups()
    path = [part for part in (field, index) if part]
    if (unknown := _UNKNOWN.fullmatch(message)) is not None:
        # It is the client's own text: enough of it to find the field, no more.
        path.append(unknown[1][:128])
        message = "Extra inputs are not permitted"
    return invalid(".".join(path) or "body", message)


def invalid(field: str, message: str) -> RequestError:
    """The error for a field that is wrong."""
    return RequestError(400, "invalid_request_error", message, field)


# --- an event's data ------------------------------------------------------------------------------------------


def is_json(payload: bytes) -> bool:
    """Whether a text is JSON to its end."""
    try:
        json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return True


def object_in(payload: bytes) -> dict[str, Any]:
    """The object that a text is; an empty one where it is none."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
