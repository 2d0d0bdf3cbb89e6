"""Mutations of bytes, numbers and JSON; each a function of a random generator, so that a seed tells everything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

INTERESTING = (0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**32, 2**62)
INTERESTING_FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    1e-30,
    1e30,
    3.4e38,
    -3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)
#: Values that a careful format does not expect in most places.
JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**40,
    1.5,
    1e308,
    "",
    " ",
    "x",
    "../x",
    "/etc/passwd",
    "\0",
    "é\ud800",
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    ["x"] * 100,
)


def mutate_bytes(random: Random, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """One to eight changes between two offsets: bits, bytes, numbers, spans deleted, repeated, moved, cut off."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        end = min(len(content), len(content) if stop is None else stop)
        if end <= start:
            break
        random.choice(_CHANGES)(random, content, start, end)
    return bytes(content)


def _flip(random: Random, content: bytearray, start: int, end: int) -> None:
    content[random.randrange(start, end)] ^= 1 << random.randrange(8)


def _byte(random: Random, content: bytearray, start: int, end: int) -> None:
    content[random.randrange(start, end)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _number(random: Random, content: bytearray, start: int, end: int) -> None:
    size = random.choice((2, 4, 8))
    at = random.randrange(start, end)
    value = random.choice(INTERESTING) % (1 << 8 * size)
    content[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))[: len(content) - at]


def _delete(random: Random, content: bytearray, start: int, end: int) -> None:
    at = random.randrange(start, end)
    del content[at : at + random.choice((1, 2, 4, 16, 256))]


def _insert(random: Random, content: bytearray, start: int, end: int) -> None:
    at = random.randrange(start, end)
    content[at:at] = random.choice((b"\0", b"\xff", b"\r\n", random.randbytes(4), b"\0" * 512))


def _repeat(random: Random, content: bytearray, start: int, end: int) -> None:
    at, size = random.randrange(start, end), random.choice((1, 4, 64, 1024))
    content[at:at] = content[at : at + size]


def _overwrite(random: Random, content: bytearray, start: int, end: int) -> None:
    at, size = random.randrange(start, end), random.choice((4, 16, 128))
    source = random.randrange(start, end)
    span = bytes(content[source : source + size])
    content[at : at + len(span)] = span


def _cut(random: Random, content: bytearray, start: int, end: int) -> None:
    del content[random.randrange(start, end) :]


_CHANGES: Sequence[Callable[[Random, bytearray, int, int], None]] = (
    _flip,
    _flip,
    _byte,
    _byte,
    _number,
    _number,
    _delete,
    _insert,
    _repeat,
    _overwrite,
    _cut,
)


def mutate_json(random: Random, value: Any) -> Any:
    """A copy in which one to three places have another value, another name, or are gone."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        container, key = random.choice(_places(value))
        action = random.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[random.choice(("", "x", str(key) + "_"))] = container.pop(key)
        elif action == 2:
            _, other = random.choice(_places(value)) if _places(value) else (None, key)
            container[key] = other if isinstance(other, str) else random.choice(JUNK)
        else:
            container[key] = _near(random, container[key])
        if not _places(value):
            break
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container below ``value`` with every key or index in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    for key in keys:
        found += _places(value[key])
    return found


def _near(random: Random, value: Any) -> Any:
    """Something of the same kind, more often wrong in what it says than in what it is."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 2, random.choice(INTERESTING)))
    if isinstance(value, float):
        return random.choice((-value, value * 2, 0.0, 1e30, 1e-30))
    if isinstance(value, str):
        return random.choice((value + "x", value[:-1], value.upper(), "../" + value, "/" + value, value * 2))
    if isinstance(value, list):
        return random.choice((value[:-1], value + value, list(reversed(value)), []))
    return random.choice(JUNK)


def text(random: Random) -> str:
    """Text as users do not write it: any plane of Unicode, control characters, none at all, very long."""
    kind = random.randrange(7)
    if kind == 0:
        return "".join(
            chr(random.choice((random.randrange(1, 0xD800), random.randrange(0xE000, 0x110000))))
            for _ in range(random.randrange(1, 40))
        )
    if kind == 1:
        return "".join(chr(random.randrange(1, 32)) for _ in range(random.randrange(1, 10)))
    if kind == 2:
        return random.choice(
            ("effusion ", "a", "\N{COMBINING ACUTE ACCENT}", "\N{ZERO WIDTH JOINER}", "[CLS]")
        ) * random.randrange(1, 20_000)
    if kind == 3:
        return random.choice(
            ("", " ", "\n", "--", "-", "{}", "%s", "[bold]x[/bold]", "[MASK] [SEP] [PAD]", "\ufeff", "\x1b[2J")
        )
    if kind == 4:
        return "".join(chr(random.choice((0x202E, 0x200B, 0xFEFF, 0x1F9EC, 0x0300, 65))) for _ in range(30))
    if kind == 5:
        return " ".join(
            random.choice(("There", "is", "no", "pleural", "effusion", ".", "9" * 50)) for _ in range(200)
        )
    return "".join(random.choice("abc ÄÖß漢字ἄ") for _ in range(random.randrange(1, 200)))
