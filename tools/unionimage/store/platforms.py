"""Names that stand for an image of each of several platforms: an index, and the images of it that
are here. The name itself leads to this machine's; the others are reached by digest or id.

What is noted ends when the name gets to another image, or goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unionimage.digest import Digest
from unionimage.errors import NotFound
from unionimage.reference import Reference

if TYPE_CHECKING:
    from unionimage.spec import Index
    from unionimage.store.contents import Contents
    from unionimage.store.model import Image


class Platforms:
    """What a name stands for. `images` are those of `index` that are here, in its order."""

    def __init__(self, data: bytes, images: tuple[Image, ...]) -> None:
        self.data = data
        self.images = images

    @property
    def index(self) -> Index:
        from unionimage.spec import Index  # most verbs do without it

        return Index.from_json(self.data)


def note(store: Contents, name: Reference, index: Digest, images: Sequence[Image]) -> Image:
    """Give a name to this machine's image, and note that it stands for all of them.

    Args:
        index: a blob that the caller's lease holds.
        images: in the order of the index.

    Returns:
        The image that has the name now; the first where none is for this machine.
    """
    from unionimage.spec import Platform

    host = Platform.host()
    chosen = next((one for one in images if one.config.platform.satisfies(host)), images[0])
    with store.database.write() as database:
        image = store.tag(chosen, name)
        database.execute("INSERT OR REPLACE INTO indexes VALUES (?, ?)", (str(name), index))
        for position, one in enumerate(images):
            if store.find(one.id) is None:
                raise NotFound(f"image {one.id.short} was removed meanwhile")
            database.execute(
                "INSERT OR REPLACE INTO index_images VALUES (?, ?, ?)",
                (str(name), position, one.id),
            )
        return image


def copy(store: Contents, source: Reference, name: Reference) -> None:
    """Let a name stand for all that another stands for."""
    if source != name and (named := of(store, source)) is not None:
        note(store, name, Digest.of(named.data), named.images)


def of(store: Contents, name: Reference) -> Platforms | None:
    """What is noted of a name."""
    row = store.database.row("SELECT digest FROM indexes WHERE name = ?", (str(name),))
    if row is None:
        return None
    rows = store.database.rows(
        "SELECT image FROM index_images WHERE name = ? ORDER BY position", (str(name),)
    )
    images = tuple(store.image_by_id(Digest(image)) for (image,) in rows)
    return Platforms(store.blobs.read(Digest(row[0])), images)


def names(store: Contents, image: Image) -> list[str]:
    """The names whose index has this image."""
    query = "SELECT name FROM index_images WHERE image = ?"
    return [name for (name,) in store.database.rows(query, (image.id,))]
