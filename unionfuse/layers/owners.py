"""Owners and modes: what is stored on disk, and what the mount shows of it.

Names and meaning are fuse-overlayfs's: id mappings, squashing all owners to one, and owner and
mode kept in an xattr where the real ones may not be set (`xattr_permissions=`, the format of
containers/storage: `UID:GID:MODE[:TYPE[-MAJOR-MINOR]]`, mode in octal).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from unionfuse import syscalls
from unionfuse.options import Mapping, MountOptions
from unionfuse.wire._attributes import Attributes

OVERFLOW_ID = 65534
"""Shown for an id that no mapping covers (/proc/sys/kernel/overflowuid)."""

_OVERRIDE = {1: b"security.fuseoverlayfs.override_stat", 2: b"user.containers.override_stat"}
_TYPES = {
    b"file": stat.S_IFREG,
    b"dir": stat.S_IFDIR,
    b"symlink": stat.S_IFLNK,
    b"pipe": stat.S_IFIFO,
    b"socket": stat.S_IFSOCK,
    b"block": stat.S_IFBLK,
    b"char": stat.S_IFCHR,
}


class Owners:
    """Translates owners between disk and mount, for one mount."""

    def __init__(self, options: MountOptions) -> None:
        self._uids, self._gids = options.uidmapping, options.gidmapping
        self._squash_uid, self._squash_gid = options.squash_to_uid, options.squash_to_gid
        self.override = _OVERRIDE.get(options.xattr_permissions)
        self.plain = not (
            self._uids
            or self._gids
            or self.override
            or self._squash_uid is not None
            or self._squash_gid is not None
        )

    def stored(self, uid: int, gid: int) -> tuple[int, int]:
        """The owner to write to disk for one that the mount names; -1 stays -1."""
        if self.plain:
            return uid, gid
        return (
            uid if uid == -1 else _stored(uid, self._uids, self._squash_uid),
            gid if gid == -1 else _stored(gid, self._gids, self._squash_gid),
        )

    def show(self, attributes: Attributes, directory: int, name: bytes) -> None:
        """Replace what was read from disk by what the mount shows."""
        if self.override is not None:
            self._read_override(attributes, directory, name)
        attributes.uid = _shown(attributes.uid, self._uids, self._squash_uid)
        attributes.gid = _shown(attributes.gid, self._gids, self._squash_gid)

    def _read_override(self, attributes: Attributes, directory: int, name: bytes) -> None:
        assert self.override is not None
        try:
            value = syscalls.getxattr(directory, name, self.override)
        except OSError:
            return
        fields = value.split(b":")
        try:
            uid, gid, mode = int(fields[0]), int(fields[1]), int(fields[2], 8)
        except (IndexError, ValueError):
            return
        kind = stat.S_IFMT(attributes.mode)
        if len(fields) > 3:
            word, *numbers = fields[3].split(b"-")
            kind = _TYPES.get(word, kind)
            if len(numbers) == 2 and all(number.isdigit() for number in numbers):
                attributes.rdev = os.makedev(int(numbers[0]), int(numbers[1]))
        attributes.uid, attributes.gid = uid, gid
        attributes.mode = kind | (mode & 0o7777)

    def write_override(self, directory: int, name: bytes, uid: int, gid: int, mode: int) -> None:
        """Keep owner and mode in the xattr; links and devices, which cannot have it, go without.

        Raises:
            OSError: of setxattr(2), such as ENOSPC.
        """
        assert self.override is not None
        value = b"%d:%d:0%o" % (uid, gid, mode & 0o7777)
        try:
            syscalls.setxattr(directory, name, self.override, value)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise


def _shown(value: int, mappings: Sequence[Mapping], squashed: int | None) -> int:
    if squashed is not None:
        return squashed
    if not mappings:
        return value
    for mapping in mappings:
        if mapping.stored <= value < mapping.stored + mapping.length:
            return value - mapping.stored + mapping.shown
    return OVERFLOW_ID


def _stored(value: int, mappings: Sequence[Mapping], squashed: int | None) -> int:
    if squashed is not None:
        return squashed
    if not mappings:
        return value
    for mapping in mappings:
        if mapping.shown <= value < mapping.shown + mapping.length:
            return value - mapping.shown + mapping.stored
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def acl_group_bits(acl: bytes) -> int:
    """The rights that an ACL in xattr form gives the owning group: its entry and the mask."""
    group, mask = 0, 7
    for offset in range(4, len(acl) - 7, 8):
        tag = int.from_bytes(acl[offset : offset + 2], "little")
        rights = int.from_bytes(acl[offset + 2 : offset + 4], "little")
        if tag == 0x04:
            group = rights
        elif tag == 0x10:
            mask = rights
    return group & mask
