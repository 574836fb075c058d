"""The survey as one page of HTML that needs nothing but itself.

The data goes in as columns of JSON, compressed: a browser unpacks 200,000 entries in a moment, and
the file stays small. Everything in it is shown as text, never as HTML: names come from outside.
"""

from __future__ import annotations

import base64
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from unionimage.explore.survey import LayerSurvey, Survey, readable
from unionimage.image_config import History
from unionimage.store import Image

WORST = 1000  # paths in the table of wasted bytes
PIECE = 10_000  # entries that are written out at a time: a million need no more memory
_GZIP = 16 + zlib.MAX_WBITS
_PLACE = b"@DATA@"


def page(image: Image, survey: Survey, title: str) -> bytes:
    """The whole page, the same bytes for the same image and title.

    Args:
        title: what the image is called.
    """
    machine = zlib.compressobj(6, zlib.DEFLATED, _GZIP)
    parts = [machine.compress(piece.encode()) for piece in _pieces(image, survey, title)]
    packed = b"".join(parts) + machine.flush()
    frame = Path(__file__).with_name("explorer.html").read_bytes()
    before, found, after = frame.partition(_PLACE)
    assert found
    return before + base64.b64encode(packed) + after


def _pieces(image: Image, survey: Survey, title: str) -> Iterator[str]:
    """The data as JSON, piece by piece."""
    yield _json(_table(image, survey, title))[:-1] + ',"layers":['
    for number, layer in enumerate(survey.layers):
        yield "," if number else ""
        yield from columns(layer)
    yield "]}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _table(image: Image, survey: Survey, title: str) -> dict[str, Any]:
    """All but the layers."""
    config = image.config
    return {
        "title": title,
        "id": image.id,
        "names": [name.familiar for name in image.names],
        "platform": str(config.platform),
        "created": config.created,
        "size": survey.size,
        "hidden": survey.hidden,
        "steps": _steps([step for step, _ in image.steps()], [s for _, s in image.steps()]),
        "wasted": _worst(survey),
        "wastedPaths": len(survey.wasted),
    }


def _steps(history: Sequence[History], layers: Sequence[object | None]) -> list[dict[str, Any]]:
    """The history, oldest first; `layer` is the number of the layer that a step made, or null."""
    steps, number = [], 0
    for step, layer in zip_longest(history, layers):
        steps.append(
            {
                "by": step.created_by or step.comment,
                "created": step.created,
                "layer": None if layer is None else number,
            }
        )
        number += layer is not None
    return steps


def columns(layer: LayerSurvey) -> Iterator[str]:
    """A layer's entries by column; names are joined by `/`, which no name has."""
    entries = layer.entries
    columns = {
        "id": layer.diff_id,
        "size": layer.size,
        "kind": entries.kind.decode(),
        "change": entries.change.decode(),
        "hides": entries.hides,
        "owners": [f"{uid}:{gid}" for uid, gid in entries.owners],
        "targets": {number: readable(target) for number, target in entries.targets.items()},
    }
    yield _json(columns)[:-1]
    for name in ("depth", "bytes", "mode", "owner"):
        yield f',"{name}":['
        yield from _numbers(getattr(entries, name))
        yield "]"
    yield ',"names":"'
    yield from _names(entries.names)
    yield '"}'


def _numbers(column: array[int]) -> Iterator[str]:
    for start in range(0, len(column), PIECE):
        yield ("," if start else "") + ",".join(map(str, column[start : start + PIECE]))


def _names(names: bytearray) -> Iterator[str]:
    """The inside of a JSON string: all but the last `/`."""
    start, end = 0, len(names) - 1
    while start < end:
        # The end of a name that lies a piece further on, or of all.
        stop = names.find(b"/", min(start + 20 * PIECE, end))
        text = "/".join(map(readable, bytes(names[start:stop]).split(b"/")))
        yield ("/" if start else "") + _json(text)[1:-1]
        start = stop + 1


def _worst(survey: Survey) -> list[list[Any]]:
    """The paths that waste most: path, layers, bytes in all, bytes that nobody sees."""
    worst = sorted(survey.wasted.items(), key=lambda item: (-item[1].hidden, item[0]))[:WORST]
    return [[readable(path), one.layers, one.total, one.hidden] for path, one in worst]
