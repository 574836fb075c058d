"""Constants and streams that both directions of a changeset need."""

from __future__ import annotations

from collections.abc import Iterator

# openat2(2)
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

OVERRIDE_STAT = b"user.containers.override_stat"
"""Where rootless extraction keeps owner, mode and type: `uid:gid:octal mode[:type[-major-minor]]`
(containers/storage, pkg/idtools and drivers/overlay; fuse-overlayfs reads it too)."""

_JOIN = 1 << 18


class PieceStream:
    """Reads from an iterator of byte strings; small ones are joined."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            data, self._rest = self._rest + b"".join(self._pieces), b""
            return data
        if not self._rest:
            collected, length = [], 0
            for piece in self._pieces:
                collected.append(piece)
                length += len(piece)
                if length >= min(size, _JOIN):
                    break
            self._rest = b"".join(collected)
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
