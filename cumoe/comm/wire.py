"""Plain data as JSON text, for ranks that are connected by text or bytes.

None, booleans, numbers, strings, bytes, and lists, tuples and dicts (with string keys) of these
come back as they were. Reading it runs nothing and makes no other types, unlike pickle.
"""

from __future__ import annotations

import base64
import json
from typing import Any

_MAX_DEPTH = 32


def dumps(value: Any) -> str:
    """Return plain data as text.

    Raises
    ------
    TypeError
        If a part is of another type.
    """
    return json.dumps(_pack(value, 0), separators=(",", ":"))


def loads(text: str | bytes) -> Any:
    """Return what :func:`dumps` was given.

    Raises
    ------
    ValueError
        If it is no such text.
    """
    try:
        return _unpack(json.loads(text), 0)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no text of plain data: {error}") from None


# JSON has no tuples and no bytes, so those and dicts are written as an object with one key.


def _pack(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise TypeError(f"expected plain data of at most {_MAX_DEPTH} levels")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is list:
        return [_pack(item, depth + 1) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, depth + 1) for item in value]}
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            raise TypeError(f"expected a dict with str keys, got {list(value)!r:.80}")
        return {"dict": {key: _pack(item, depth + 1) for key, item in value.items()}}
    raise TypeError(
        "expected None, bool, int, float, str, bytes, or lists, tuples and dicts of these, got "
        f"{type(value).__name__}"
    )


def _unpack(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_unpack(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "tuple":
        return tuple(_unpack(item, depth + 1) for item in content)
    if kind == "dict":
        return {key: _unpack(item, depth + 1) for key, item in content.items()}
    raise ValueError(f"unknown kind {kind!r}")
