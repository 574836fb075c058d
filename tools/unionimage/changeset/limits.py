"""What one layer may cost at most."""

from __future__ import annotations

from unionimage.tuples import NamedTuple


class Limits(NamedTuple):
    """Against archives that are small and unpack without end.

    Attributes:
        size: bytes of the uncompressed archive.
        entries: entries in it.
    """

    size: int = 256 << 30
    entries: int = 10_000_000
