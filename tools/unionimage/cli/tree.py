"""`images --tree`: the layers of all images, from base to top, each once."""

from __future__ import annotations

import json
from typing import Any

from unionimage.digest import Digest, chain_ids
from unionimage.store import Image, Layer


class Node:
    """A layer on the layers above it in the tree: a chain.

    Attributes:
        chain_id: None for images without layers.
        size: bytes of the chain so far, docker's virtual size.
        images: those of which it is the top.
        users: images that have it.
    """

    def __init__(self, chain_id: Digest | None, layer: Layer | None, size: int) -> None:
        self.chain_id = chain_id
        self.layer = layer
        self.size = size
        self.images: list[Image] = []
        self.users = 0
        self.children: dict[Digest, Node] = {}


def show_tree(images: list[Image], form: str | None) -> None:
    """Print the tree, or with `form` json the same as nested objects."""
    root = tree_of(images)
    top = list(root.children.values())
    if root.images:
        nameless = Node(None, None, 0)
        nameless.images, nameless.users = root.images, len(root.images)
        top.append(nameless)
    if form == "json":
        print(json.dumps([_object(node) for node in top], indent=2))
        return
    for number, node in enumerate(top):
        _print(node, "", number == len(top) - 1)


def tree_of(images: list[Image]) -> Node:
    """The chains of all images; the root itself stands for images without layers."""
    root = Node(None, None, 0)
    for image in sorted(images, key=lambda image: (image.names, image.id)):
        node = root
        for chain_id, layer in zip(chain_ids(image.diff_ids), image.layers, strict=True):
            if chain_id not in node.children:
                node.children[chain_id] = Node(chain_id, layer, node.size + layer.size)
            node = node.children[chain_id]
            node.users += 1
        node.images.append(image)
    return root


def _titles(node: Node) -> list[str]:
    titles = []
    for image in node.images:
        titles += [name.familiar for name in image.names] or [f"<none>@{image.id.short}"]
    return titles


def _print(node: Node, indent: str, last: bool) -> None:
    identity = node.chain_id.short if node.chain_id else "<no layers>"
    line = f"{indent}+-{identity} Virtual Size: {_megabytes(node.size)}"
    if titles := _titles(node):
        line += " Tags: " + ", ".join(titles)
    if node.users > 1:
        line += f" (shared by {node.users} images)"
    print(line)
    below = indent + ("  " if last else "| ")
    children = list(node.children.values())
    for number, child in enumerate(children):
        _print(child, below, number == len(children) - 1)


def _megabytes(size: float) -> str:
    """`187.8 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _object(node: Node) -> dict[str, Any]:
    return {
        "ChainID": node.chain_id,
        "DiffID": node.layer.diff_id if node.layer else None,
        "Size": node.layer.size if node.layer else 0,
        "VirtualSize": node.size,
        "Tags": [name.familiar for image in node.images for name in image.names],
        "Images": [image.id for image in node.images],
        "Users": node.users,
        "Children": [_object(child) for child in node.children.values()],
    }
