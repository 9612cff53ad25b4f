"""Mutations of valid files: of the structure of JSON, and of any file's bytes."""

import copy
import json
import random
import re
from typing import Any

import numpy as np
from PIL import Image

# Values that no field expects; texts marked with _RAW are written as they are, which `json.dumps` would not do.
_RAW = "\x1araw:"
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**63,
    10**400,
    -(10**400),
    1e308,
    _RAW + "9" * 5000,
    _RAW + "NaN",
    _RAW + "-Infinity",
    _RAW + "1e999",
    _RAW + "[" * 20000,
    _RAW + "[" * 900 + "]" * 900,
    _RAW + '{"a": 1, "a": 2}',
    _RAW + '"\\ud800"',
    "",
    " \n",
    "\0",
    "a\0b",
    "a\nb",
    "\u200b",
    "\ufeff",
    "<extra_id_0>",
    "<image>",
    "[0.1,0.1,0.2,0.2]",
    "[0.100,0.100,0.200,0.200]",
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "x" * 70000,
    "{}",
    "{0.__class__}",
    "9" * 5000,
    "\u0661",
    "nan",
    [],
    {},
    [[]],
    [None],
    [0, 0, 1, 1],
    [[0, 0, 1, 1]],
    [[0, 0, 1, None]],
    ["a", 1],
    {"bytes": 1},
    {"path": "a.png"},
    {"bytes": "a.png"},
    {"": None},
)


def mutate_json(value: Any, rng: random.Random, times: int) -> str:
    """Return JSON of a value after changes at random places."""
    value = copy.deepcopy(value)
    for _ in range(times):
        value = _mutated(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    marker = re.escape(json.dumps(_RAW)[1:-1])
    text = re.sub(rf'"{marker}((?:[^"\\]|\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), text)
    return _repeat_name(text, rng) if times and rng.random() < 0.1 else text


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return a file's bytes after one change."""
    at = rng.randrange(len(content) + 1)
    kind = rng.randrange(9)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return (
            content[:at]
            + rng.choice([b"\0", b"\xff", b"\n", b"\r\n", b'"', b"{", b",", b"\xef\xbb\xbf"])
            + content[at:]
        )
    if kind == 2:
        return content[:at] + rng.randbytes(rng.choice([1, 4, 512])) + content[at:]
    if kind == 3:
        end = at + rng.choice([1, 2, 8, 64, 512])
        return content[:at] + rng.randbytes(len(content[at:end])) + content[end:]
    if kind == 4:
        return content[:at] + content[at + rng.choice([1, 10, 512]) :]
    if kind == 5:
        return content + content[at:]
    if kind == 6:
        return b"".join(
            bytes([byte ^ (1 << rng.randrange(8))]) if rng.random() < 0.002 else bytes([byte]) for byte in content
        )
    if kind == 7:
        return content.decode("utf-8", "replace").encode(
            rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]), "replace"
        )
    return rng.choice([b"", b"\n", b"\0" * 1024, b"\xef\xbb\xbf", b"PK\x03\x04", b"PAR1", rng.randbytes(2000)])


def png(color: tuple[int, int, int]) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), color, np.uint8)).save(file, "PNG")
    return file.getvalue()


def _mutated(value: Any, rng: random.Random) -> Any:
    """Change a value, or a value in it."""
    if not isinstance(value, dict | list) or not value or rng.random() >= 0.85:
        return copy.deepcopy(rng.choice(VALUES))
    names = isinstance(value, dict)
    place = rng.choice(list(value)) if names else rng.randrange(len(value))
    kind = rng.randrange(8)
    if kind == 0:
        del value[place]
    elif kind == 1 and names:
        value[rng.choice(["", "id", "image", place + " ", "a\nb", "x" * 300, "\0"])] = value.pop(place)
    elif kind == 1:
        value.append(copy.deepcopy(value[place]))
    elif kind == 2 and names:
        value["extra"] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 2:
        value.insert(place, copy.deepcopy(rng.choice(VALUES)))
    else:
        value[place] = _mutated(value[place], rng)
    return value


def _repeat_name(text: str, rng: random.Random) -> str:
    names = list(re.finditer(r'"(\w+)": ', text))
    if not names:
        return text
    name = rng.choice(names)
    return f"{text[: name.start()]}{name[0]}{rng.choice(['null', '1', '[]'])}, {text[name.start() :]}"
