"""What is left of a node without a name, as bytes: all that the next daemon has of it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from unionfuse.tree.node import Directory, Node
from unionfuse.wire._attributes import PACKED_SIZE, Attributes

# flags, kind, link_offset, layer; lengths of path, name, index_name
_FAREWELL = struct.Struct("=IIqi3H")
_IN_UPPER, _METACOPY, _HAS_LAST, _MAPPABLE = 1, 2, 4, 8


class Farewell(NamedTuple):
    """The fields of a node (see there) that its name does not tell.

    Attributes:
        layer: the key of the layer that `path` and `name` are in; -1 for none.
    """

    kind: int
    in_upper: bool
    metacopy: bool
    mappable: bool
    link_offset: int
    layer: int
    path: bytes
    name: bytes
    index_name: bytes
    last: Attributes | None


def farewell(node: Node) -> bytes:
    """All that a node is without its name."""
    place = None if isinstance(node, Directory) else node.lower
    layer = -1 if place is None else place.layer.key
    path, name = (b"", b"") if place is None else (place.path, place.name)
    texts = (path, name, node.index_name)
    flags = (node.in_upper * _IN_UPPER) | (node.metacopy * _METACOPY)
    flags |= (node.mappable * _MAPPABLE) | (_HAS_LAST if node.last is not None else 0)
    out = _FAREWELL.pack(flags, node.kind, node.link_offset, layer, *map(len, texts))
    if node.last is not None:
        out += node.last.packed()
    return out + b"".join(texts)


def read(written: bytes) -> Farewell:
    """What `farewell` wrote."""
    flags, kind, link_offset, layer, *lengths = _FAREWELL.unpack_from(written)
    at = _FAREWELL.size
    last = None
    if flags & _HAS_LAST:
        last = Attributes.unpacked(written[at : at + PACKED_SIZE])
        at += PACKED_SIZE
    texts = []
    for length in lengths:
        texts.append(written[at : at + length])
        at += length
    path, name, index_name = texts
    in_upper, metacopy = bool(flags & _IN_UPPER), bool(flags & _METACOPY)
    mappable = bool(flags & _MAPPABLE)
    return Farewell(
        kind, in_upper, metacopy, mappable, link_offset, layer, path, name, index_name, last
    )


def descriptor_name(number: int) -> str:
    """What a deleted node's descriptor is kept under."""
    return f"node-{number}"
