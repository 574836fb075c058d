"""The marks that a union leaves on disk: whiteouts, opaque directories, redirects and their kin.

Read in every dialect that is about:
- kernel overlayfs, Documentation/filesystems/overlayfs.rst: a character device 0:0; xattrs below
  `trusted.overlay.`, or `user.overlay.` with `userxattr`; zero-size files with an xattr
  `overlay.whiteout` in a directory whose `overlay.opaque` is `x`.
- fuse-overlayfs: `user.fuseoverlayfs.` for the same, and files `.wh.NAME`.
- AUFS and OCI layers: files `.wh.NAME`, and `.wh..wh..opq` for an opaque directory.

Written as kernel overlayfs writes them. This module knows names and values, not the merged tree.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from unionfuse import syscalls

WHITEOUT_PREFIX = b".wh."
OPAQUE_FILE = b".wh..wh..opq"

TRUSTED = b"trusted.overlay."
USER = b"user.overlay."
FUSE_OVERLAYFS = b"user.fuseoverlayfs."
DIALECTS = (TRUSTED, USER, FUSE_OVERLAYFS)

_MISSING = (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


class Marks:
    """What the overlay's own xattrs say of one file or directory.

    Attributes:
        opaque: nothing below this directory shows through it.
        whiteouts_inside: the directory holds whiteouts in xattr form (`opaque=x`).
        whiteout: the file is such a whiteout.
        redirect: where to go on looking below: `/from/root`, or a sibling's name; None for none.
        metacopy: the file's data is still in a lower layer.
        origin: the file handle of the lower file this was copied from, in overlayfs's encoding.
        inode: the st_ino that the lower file had, where unionfuse copied it up; 0 for unknown.
        nlink: overlayfs's note about the union's link count (`U+1`, `L-2`); empty for none.
    """

    __slots__ = (
        "inode",
        "metacopy",
        "nlink",
        "opaque",
        "origin",
        "redirect",
        "whiteout",
        "whiteouts_inside",
    )

    def __init__(self, opaque: bool = False) -> None:
        self.opaque = opaque
        self.whiteouts_inside = False
        self.whiteout = False
        self.redirect: bytes | None = None
        self.metacopy = False
        self.origin = b""
        self.inode = 0
        self.nlink = b""


NO_MARKS = Marks()


def read_marks(directory: int, name: bytes) -> Marks:
    """The marks on `name` in a directory (on the descriptor itself where the name is empty)."""
    try:
        attributes = syscalls.listxattr(directory, name)
    except OSError as error:
        if error.errno in _MISSING:
            return NO_MARKS
        raise
    own = [attribute for attribute in attributes if attribute.startswith(DIALECTS)]
    if not own:
        return NO_MARKS
    marks = Marks()
    for attribute in own:
        _read_mark(marks, directory, name, attribute)
    return marks


def _read_mark(marks: Marks, directory: int, name: bytes, attribute: bytes) -> None:
    key = next(attribute[len(p) :] for p in DIALECTS if attribute.startswith(p))
    try:
        value = syscalls.getxattr(directory, name, attribute)
    except OSError as error:
        if error.errno in _MISSING:
            return
        raise
    if key == b"opaque":
        marks.opaque = marks.opaque or value == b"y"
        marks.whiteouts_inside = marks.whiteouts_inside or value == b"x"
    elif key == b"whiteout":
        marks.whiteout = True
    elif key == b"redirect":
        marks.redirect = value
    elif key == b"metacopy":
        marks.metacopy = True
    elif key == b"origin" and attribute.startswith((TRUSTED, USER)):
        marks.origin = value
    elif key == b"unionfuse.inode":
        marks.inode = int(value) if value.isdigit() else 0
    elif key == b"nlink":
        marks.nlink = value


def is_whiteout(status: os.stat_result) -> bool:
    """Whether a stat result is that of a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


# --- names of xattrs, inside the mount and on disk -------------------------------------------


def escape_attribute(attribute: bytes) -> bytes:
    """The name on disk of an xattr that is set through the mount.

    The overlay's own names are kept apart by doubling: `trusted.overlay.x` is stored as
    `trusted.overlay.overlay.x` (overlayfs since Linux 6.7), so that unions nest.
    """
    for prefix in DIALECTS:
        if attribute.startswith(prefix):
            return prefix + _doubled(prefix) + attribute[len(prefix) :]
    return attribute


def unescape_attribute(attribute: bytes) -> bytes | None:
    """The name in the mount of an xattr on disk; None for the overlay's own, which never show."""
    for prefix in DIALECTS:
        if attribute.startswith(prefix):
            rest = attribute[len(prefix) :]
            double = _doubled(prefix)
            return prefix + rest[len(double) :] if rest.startswith(double) else None
    return attribute


def _doubled(prefix: bytes) -> bytes:
    return prefix.split(b".")[1] + b"."


# --- origin: which lower file a copy came from ------------------------------------------------

# fs/overlayfs/overlayfs.h, struct ovl_fh: one pad-free header in front of the file handle.
_ORIGIN = struct.Struct("=BBBBB16s")
_MAGIC = 0xFB
_BIG_ENDIAN = 1  # OVL_FH_FLAG_BIG_ENDIAN; little endian is 0


def encode_origin(handle_type: int, handle: bytes, uuid: bytes) -> bytes:
    """A file handle in overlayfs's form (struct ovl_fb)."""
    size = _ORIGIN.size + len(handle)
    flags = _BIG_ENDIAN if struct.pack("=H", 1) == b"\0\1" else 0
    return _ORIGIN.pack(0, _MAGIC, size, flags, handle_type, uuid) + handle


def decode_origin(origin: bytes) -> tuple[int, bytes, bytes] | None:
    """(handle type, handle, uuid) of an origin xattr; None where it is empty or of another form."""
    if len(origin) < _ORIGIN.size:
        return None
    version, magic, size, _flags, kind, uuid = _ORIGIN.unpack_from(origin)
    if version != 0 or magic != _MAGIC or size != len(origin):
        return None
    return kind, origin[_ORIGIN.size :], uuid


# --- writing ----------------------------------------------------------------------------------


class Marker:
    """Writes marks into one upper directory tree, in the dialect that its file system allows.

    Arguments:
        prefix: `trusted.overlay.` or, without privilege, `user.overlay.`.
        shelf: a directory descriptor and a name in it, free: for a whiteout that the others are
            links of, which costs no inode each (ovl_whiteout in fs/overlayfs/dir.c does so, too).
            None: each is a device of its own.
    """

    def __init__(self, prefix: bytes, shelf: tuple[int, bytes] | None = None) -> None:
        self.prefix = prefix
        self.devices = True  # until mknod of 0:0 is refused
        self._shelf = shelf
        self._shelved = False

    def set(self, directory: int, name: bytes, key: bytes, value: bytes) -> None:
        """Set the overlay's xattr `key` on a file or directory."""
        syscalls.setxattr(directory, name, self.prefix + key, value)

    def remove(self, directory: int, name: bytes, key: bytes) -> None:
        """Remove the overlay's xattr `key`; not having it is fine."""
        try:
            syscalls.removexattr(directory, name, self.prefix + key)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise

    def set_opaque(self, directory: int, name: bytes) -> None:
        """Cut the directory off from what lies below it."""
        self.set(directory, name, b"opaque", b"y")

    def make_device(self, directory: int, name: bytes) -> bool:
        """Create a whiteout in device form; False where that is refused, now and for ever."""
        if not self.devices:
            return False
        if self._shelf is not None and self._link_device(*self._shelf, directory, name):
            return True
        try:
            syscalls.mknod(directory, name, stat.S_IFCHR, 0)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.devices = False
        return self.devices

    def _link_device(self, holder: int, kept: bytes, directory: int, name: bytes) -> bool:
        """Give the whiteout that is kept one more name; False: it has to be done otherwise."""
        try:
            if not self._shelved:
                syscalls.mknod(holder, kept, stat.S_IFCHR, 0)
                self._shelved = True
            syscalls.link(holder, kept, directory, name)
            return True
        except OSError as error:
            if error.errno == errno.EMLINK:  # it has as many as it may: the next is another one
                syscalls.unlink(holder, kept)
                self._shelved = False
            elif error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV):
                self._shelf = None
            else:
                raise
            return False

    def make_whiteout(self, directory: int, name: bytes) -> None:
        """Create a whiteout under a free name of the staging directory.

        In xattr form it counts only where the directory it ends up in is marked: see
        `allow_whiteouts`.
        """
        if self.make_device(directory, name):
            return
        descriptor = syscalls.create(directory, name, os.O_WRONLY, 0)
        try:
            self.set(descriptor, b"", b"whiteout", b"")
        finally:
            os.close(descriptor)

    def allow_whiteouts(self, directory: int) -> None:
        """Mark a directory as holding whiteouts in xattr form, where that is the form written."""
        if self.devices:
            return
        if not read_marks(directory, b"").opaque:
            self.set(directory, b"", b"opaque", b"x")
