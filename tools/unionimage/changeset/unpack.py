"""Layer tar → a directory that overlay file systems can mount as a lower layer.

Nothing in an archive is trusted: every entry's parent is entered by openat2 with RESOLVE_IN_ROOT,
so links can lead nowhere else, and only the last component is created, never followed. Whiteouts
become character devices 0:0, or empty files with an xattr where the file system refuses those (as
kernel overlayfs does), opaque marks become xattrs. It does *not* know what lies below the layer; a
whiteout of a name that the same layer holds only cuts off what is below (OCI image-spec, layer.md,
"Whiteouts").

Without privilege owners, modes and devices are kept as an xattr (`paths.OVERRIDE_STAT`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable

from unionfuse import syscalls
from unionfuse.layers import whiteout
from unionimage.changeset import tar
from unionimage.changeset.limits import Limits
from unionimage.changeset.paths import OVERRIDE_STAT, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS
from unionimage.changeset.recipe import RecipeWriter
from unionimage.digest import Readable
from unionimage.errors import BadContent, UserError
from unionimage.tuples import NamedTuple

_OPEN_DIRECTORIES = 64
_O_DIR = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_PATH_MAX = 4096  # a link's target and its NUL (symlink(2))
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_CLOSED_TO_OTHERS = 0o700
_KIND_NAMES = {tar.FIFO: "pipe", tar.CHAR: "char", tar.BLOCK_DEVICE: "block"}
_BAD_ENTRY = (
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EXDEV,
    errno.EINVAL,
    errno.E2BIG,
    errno.ERANGE,
)
_NO_XATTR = (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)


class Fingerprint(NamedTuple):
    """A file's content: xxh3_64 as a signed number, as SQLite has them."""

    path: bytes
    size: int
    hash: int


class Unpacked:
    """What came out of an archive.

    Attributes:
        entries: entries in it, whiteouts included.
        size: bytes of the files.
        replaced: number of a recipe's FILE segment -> name of the file in the displaced directory,
            for files that later entries of the same archive took the place of.
        doubtful: contradictory entries; the recipe has to be tried before it is believed.
        fingerprints: of the files that were asked for.
    """

    def __init__(self) -> None:
        self.entries = 0
        self.size = 0
        self.replaced: dict[int, int] = {}
        self.doubtful = False
        self.fingerprints: list[Fingerprint] = []


def unpack(
    stream: Readable,
    directory: int,
    *,
    displaced: int | None = None,
    recipe: RecipeWriter | None = None,
    limits: Limits | None = None,
    rootless: bool | None = None,
    fingerprint_from: int | None = None,
    what: str = "layer",
) -> Unpacked:
    """Unpack a layer into an empty directory.

    Args:
        stream: the uncompressed tar.
        directory: descriptor of the directory, which is the layer's root.
        displaced: descriptor of a directory beside it on the same file system, where files go
            whose place a later entry takes; only needed with a recipe.
        recipe: is told the whole archive.
        limits: what is refused.
        rootless: keep owners as xattrs; None: unless this is root.
        fingerprint_from: take fingerprints of files of at least that many bytes; None: of none.
        what: how messages name the layer.

    Raises:
        BadContent: the archive is damaged or hostile.
        UserError: an entry needs a privilege that is missing.
        OSError: the disk is full, and the like.
    """
    if rootless is None:  # the variable is set where a user is root of a namespace of his own
        rootless = os.geteuid() != 0 or "UNIONFUSE_ROOTLESS" in os.environ
    work = _Unpack(directory, displaced, recipe, rootless, fingerprint_from)
    reader = tar.Reader(stream, recipe, limits, what)
    try:
        for entry in reader:
            work.result.entries += 1
            try:
                work.add(entry, reader)
            except OSError as error:
                name = os.fsdecode(entry.name[:80])
                if error.errno in _BAD_ENTRY:
                    raise BadContent(f"{what}: entry {name!r}: {error.strerror}") from None
                if error.errno == errno.EPERM:
                    raise UserError(f"{what}: entry {name!r} needs a privilege: {error}") from None
                raise
        work.finish()
    finally:
        work.close()
    if recipe:
        recipe.finish()
    return work.result


class _Unpack:
    def __init__(
        self,
        root: int,
        displaced: int | None,
        recipe: RecipeWriter | None,
        rootless: bool,
        fingerprint_from: int | None,
    ) -> None:
        self.result = Unpacked()
        self._root = root
        self._displaced = displaced
        self._recipe = recipe
        self._rootless = rootless
        self._fingerprint_from = fingerprint_from
        self._parents: OrderedDict[bytes, int] = OrderedDict()
        self._directories: dict[bytes, tar.Entry | None] = {}  # set when all files are there
        self._files: dict[bytes, int] = {}  # path -> recipe segment, while there is a recipe
        self._displacements = 0
        self._marker = whiteout.Marker(whiteout.USER if rootless else whiteout.TRUSTED)
        self._attribute_whiteouts: dict[bytes, set[bytes]] = {}  # directory -> names in it

    def add(self, entry: tar.Entry, reader: tar.Reader) -> None:
        path = _clean(entry.name)
        if not path:
            if entry.kind != tar.DIRECTORY:
                raise BadContent(f"layer: its root directory is an entry of type {entry.kind:c}")
            self._directories[b""] = entry
            return
        parent_path, _, base = path.rpartition(b"/")
        if base.startswith(whiteout.WHITEOUT_PREFIX):
            self._whiteout(parent_path, base)
            return
        parent = self._enter(parent_path)
        kind = entry.kind
        if kind == tar.FILE:
            self._file(parent, path, base, entry, reader)
        elif kind == tar.DIRECTORY:
            self._make_directory(parent, path, base)
            self._directories[path] = entry
        elif kind == tar.LINK:
            self._link(parent, path, base, entry)
        elif kind == tar.SYMLINK:
            if not 0 < len(entry.link) < _PATH_MAX:
                shown = os.fsdecode(path)
                raise BadContent(f"layer: {shown!r} is a symbolic link to {len(entry.link)} bytes")
            self._create(parent, path, base, lambda: os.symlink(entry.link, base, dir_fd=parent))
            self._set_unopened(parent, base, entry, stat.S_IFLNK)
        else:
            self._special(parent, path, base, entry)

    def finish(self) -> None:
        """Directories get their attributes last, children first: files would change their times."""
        if b"" not in self._directories:
            os.fchmod(self._root, 0o755)
        for path in sorted(self._directories, reverse=True):
            entry = self._directories[path]
            entry = entry or tar.Entry(path, tar.DIRECTORY, 0o755)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            try:
                opened = syscalls.openat2(self._root, path or b".", flags, RESOLVE_IN_ROOT)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue  # another entry of the same archive took its place
                raise
            try:
                self._set_opened(opened, entry)
            finally:
                os.close(opened)

    def close(self) -> None:
        while self._parents:
            os.close(self._parents.popitem()[1])

    # --- kinds of entries

    def _file(
        self, parent: int, path: bytes, base: bytes, entry: tar.Entry, reader: tar.Reader
    ) -> None:
        try:
            file = os.open(base, _NEW_FILE, 0o600, dir_fd=parent)
        except FileExistsError:
            self._make_way(parent, path, base)
            file = os.open(base, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            if entry.sparse is not None:
                self._sparse(file, entry, reader)
            elif entry.size:
                if self._recipe:
                    self._files[path] = self._recipe.files
                    reader.payload_is_file(path, entry.size)
                wanted = self._fingerprint_from
                if wanted is not None and entry.size >= wanted:
                    self._write_fingerprinted(file, path, entry, reader)
                else:
                    for piece in reader.payload():
                        _write(file, piece)
            self.result.size += entry.size
            self._set_opened(file, entry)
        finally:
            os.close(file)

    def _write_fingerprinted(
        self, file: int, path: bytes, entry: tar.Entry, reader: tar.Reader
    ) -> None:
        import xxhash

        hasher = xxhash.xxh3_64()
        for piece in reader.payload():
            hasher.update(piece)
            _write(file, piece)
        signed = hasher.intdigest() - (1 << 63)
        self.result.fingerprints.append(Fingerprint(path, entry.size, signed))

    def _sparse(self, file: int, entry: tar.Entry, reader: tar.Reader) -> None:
        ranges = iter(entry.sparse or ())
        offset, left = 0, 0
        os.ftruncate(file, entry.real_size)
        for piece in reader.payload():
            while piece:
                while not left:
                    offset, left = next(ranges)
                count = os.pwrite(file, piece[:left], offset)
                piece, offset, left = piece[count:], offset + count, left - count

    def _link(self, parent: int, path: bytes, base: bytes, entry: tar.Entry) -> None:
        target = _clean(entry.link)
        if target == path:
            raise BadContent(f"layer: {os.fsdecode(path)!r} is a hard link to itself")
        source_path, _, source = target.rpartition(b"/")
        if not source or source.startswith(whiteout.WHITEOUT_PREFIX):
            raise BadContent(f"layer: bad target of the hard link {os.fsdecode(path)!r}")

        def link() -> None:
            directory = self._enter(source_path, create=False)
            os.link(source, base, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)

        try:
            status = os.stat(
                source, dir_fd=self._enter(source_path, create=False), follow_symlinks=False
            )
            if stat.S_ISDIR(status.st_mode) or self._is_whiteout(source_path, source, status):
                raise FileNotFoundError(errno.ENOENT, "")
            self._create(parent, path, base, link)
        except FileNotFoundError:
            raise BadContent(
                f"layer: hard link {os.fsdecode(path)!r} leads to {os.fsdecode(entry.link)!r},"
                " which is no file of this layer"
            ) from None

    def _special(self, parent: int, path: bytes, base: bytes, entry: tar.Entry) -> None:
        kinds = {tar.FIFO: stat.S_IFIFO, tar.CHAR: stat.S_IFCHR, tar.BLOCK_DEVICE: stat.S_IFBLK}
        kind = kinds[entry.kind]
        device = 0
        if kind != stat.S_IFIFO:
            if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
                raise BadContent(f"layer: device {os.fsdecode(path)!r} has an impossible number")
            device = os.makedev(entry.major, entry.minor)
        if self._rootless and kind != stat.S_IFIFO and (kind != stat.S_IFCHR or device):
            self._create(parent, path, base, lambda: self._placeholder(parent, base))
            self._set_unopened(parent, base, entry, stat.S_IFREG)
            return
        self._create(
            parent, path, base, lambda: os.mknod(base, kind | 0o600, device, dir_fd=parent)
        )
        self._set_unopened(parent, base, entry, kind)

    @staticmethod
    def _placeholder(parent: int, base: bytes) -> None:
        os.close(os.open(base, _NEW_FILE, 0o600, dir_fd=parent))

    def _whiteout(self, parent_path: bytes, base: bytes) -> None:
        if base == whiteout.OPAQUE_FILE:
            self._mark_opaque(parent_path)
            return
        name = base[len(whiteout.WHITEOUT_PREFIX) :]
        if name.startswith(whiteout.WHITEOUT_PREFIX):
            return  # AUFS's own files (.wh..wh.plnk …), which mean nothing outside of it
        if name in (b"", b".", b".."):
            raise BadContent(f"layer: whiteout {os.fsdecode(base)!r} names nothing")
        parent = self._enter(parent_path)
        try:
            if not self._marker.make_device(parent, name):
                self._attribute_whiteout(parent_path, parent, name)
        except FileExistsError:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._mark_opaque(parent_path + b"/" + name if parent_path else name)

    def _is_whiteout(self, parent_path: bytes, name: bytes, status: os.stat_result) -> bool:
        inside = self._attribute_whiteouts.get(parent_path)
        return whiteout.is_whiteout(status) or (inside is not None and name in inside)

    def _attribute_whiteout(self, parent_path: bytes, parent: int, name: bytes) -> None:
        """A whiteout in xattr form; an opaque directory needs none, and would show it as a file."""
        readable = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
        try:
            if whiteout.read_marks(readable, b"").opaque:
                return
            self._marker.make_whiteout(readable, name)
            self._marker.allow_whiteouts(readable)
        finally:
            os.close(readable)
        self._attribute_whiteouts.setdefault(parent_path, set()).add(name)

    # --- directories

    def _enter(self, path: bytes, create: bool = True) -> int:
        """A descriptor of a directory of this layer, made with its parents where missing."""
        if not path:
            return self._root
        if (opened := self._parents.get(path)) is not None:
            self._parents.move_to_end(path)
            return opened
        try:
            opened = syscalls.openat2(self._root, path, _O_DIR, _RESOLVE)
        except OSError as error:
            if not create or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            opened = self._make_parents(path)
        if path not in self._directories:
            self.result.doubtful |= self._recipe is not None
        self._parents[path] = opened
        if len(self._parents) > _OPEN_DIRECTORIES:
            os.close(self._parents.popitem(last=False)[1])
        return opened

    def _make_parents(self, path: bytes) -> int:
        opened, end = self._root, 0
        while end < len(path):
            start, end = end, path.find(b"/", end + 1)
            end = end if end > 0 else len(path)
            above = opened
            try:
                base = path[start:end].lstrip(b"/")
                self._make_directory(above, path[:end], base, only_missing=True)
                opened = syscalls.openat2(self._root, path[:end], _O_DIR, _RESOLVE)
            except FileNotFoundError:
                raise NotADirectoryError(errno.ENOTDIR, "a parent is a link to nothing") from None
            finally:
                if above != self._root:
                    os.close(above)
        return opened

    def _make_directory(
        self, parent: int, path: bytes, base: bytes, only_missing: bool = False
    ) -> None:
        try:
            os.mkdir(base, _CLOSED_TO_OTHERS, dir_fd=parent)
        except FileExistsError:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return
            hidden = self._is_whiteout(path.rpartition(b"/")[0], base, status)
            if only_missing and stat.S_ISLNK(status.st_mode):
                return  # openat2 will tell where it leads inside the layer, if anywhere
            if only_missing and not hidden:
                raise NotADirectoryError(errno.ENOTDIR, "a parent is not a directory") from None
            self._make_way(parent, path, base)
            os.mkdir(base, _CLOSED_TO_OTHERS, dir_fd=parent)
            if hidden:
                self._mark_opaque(path)
        self._directories.setdefault(path, None)

    def _mark_opaque(self, path: bytes) -> None:
        opened = syscalls.openat2(
            self._enter(path), b".", os.O_RDONLY | os.O_DIRECTORY, RESOLVE_IN_ROOT
        )
        try:
            for name in self._attribute_whiteouts.pop(path, ()):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=opened)
            self._marker.set_opaque(opened, b"")
        finally:
            os.close(opened)

    # --- names that are taken

    def _create(self, parent: int, path: bytes, base: bytes, make: Callable[[], None]) -> None:
        try:
            make()
        except FileExistsError:
            self._make_way(parent, path, base)
            make()

    def _make_way(self, parent: int, path: bytes, base: bytes) -> None:
        """Remove what an earlier entry put there; its content stays where a recipe needs it."""
        parent_path = path.rpartition(b"/")[0]
        if parent_path in self._attribute_whiteouts:
            self._attribute_whiteouts[parent_path].discard(base)
        below = path + b"/"
        for stale in [one for one in self._parents if one == path or one.startswith(below)]:
            os.close(self._parents.pop(stale))
        status = os.stat(base, dir_fd=parent, follow_symlinks=False)
        is_directory = stat.S_ISDIR(status.st_mode)
        if self._recipe and self._displaced is not None and (path in self._files or is_directory):
            self._displacements += 1
            name = b"%d" % self._displacements
            os.rename(base, name, src_dir_fd=parent, dst_dir_fd=self._displaced)
            for other in [one for one in self._files if one == path or one.startswith(below)]:
                self._displace(name, other[len(path) :], self._files.pop(other))
        elif is_directory:
            import shutil  # rare, and slow to import

            shutil.rmtree(base, dir_fd=parent)
        else:
            os.unlink(base, dir_fd=parent)
        if is_directory:
            for known in (self._directories, self._attribute_whiteouts):
                for other in [one for one in known if one == path or one.startswith(below)]:
                    del known[other]

    def _displace(self, name: bytes, rest: bytes, segment: int) -> None:
        """Give the content of a recipe's segment a name of its own in the displaced directory."""
        assert self._displaced is not None
        if not rest:
            self.result.replaced[segment] = int(name)
            return
        parent, _, base = (name + rest).rpartition(b"/")
        try:
            directory = syscalls.open_beneath(self._displaced, parent, _O_DIR)
        except OSError:  # it was made through a link: contradictory enough to be tried
            self.result.doubtful = True
            return
        self._displacements += 1
        new = b"%d" % self._displacements
        try:
            os.link(
                base, new, src_dir_fd=directory, dst_dir_fd=self._displaced, follow_symlinks=False
            )
        finally:
            os.close(directory)
        self.result.replaced[segment] = self._displacements

    # --- attributes

    def _set_opened(self, file: int, entry: tar.Entry) -> None:
        if self._rootless:
            readable = 0o700 if entry.kind == tar.DIRECTORY else 0o600
            os.fchmod(file, entry.mode & 0o1777 | readable)
            os.setxattr(file, OVERRIDE_STAT, _override(entry))
        else:
            # Also for 0:0: a parent's set-group-id bit hands its group down.
            os.fchown(file, entry.uid, entry.gid)
            os.fchmod(file, entry.mode)
        if entry.xattrs:
            self._set_xattrs(file, entry, True)
        os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))

    def _set_unopened(self, parent: int, base: bytes, entry: tar.Entry, kind: int) -> None:
        if self._rootless:
            if kind in (stat.S_IFREG, stat.S_IFIFO):
                with contextlib.suppress(PermissionError):  # pipes cannot have it
                    os.setxattr(syscalls.proc_path(parent, base), OVERRIDE_STAT, _override(entry))
        else:
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            if kind != stat.S_IFLNK:
                os.chmod(base, entry.mode, dir_fd=parent)
        if entry.xattrs:
            self._set_xattrs(syscalls.proc_path(parent, base), entry, False)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(base, ns=times, dir_fd=parent, follow_symlinks=False)

    def _set_xattrs(self, target: int | bytes, entry: tar.Entry, opened: bool) -> None:
        for key, value in entry.xattrs.items():
            if self._rootless and not key.startswith(b"user."):
                continue  # the archive itself, which is kept, still has it
            name = whiteout.escape_attribute(key)
            if name == OVERRIDE_STAT:
                raise BadContent(f"layer: {os.fsdecode(entry.name)!r} has a reserved xattr")
            try:
                if opened:
                    os.setxattr(target, name, value)
                else:
                    os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_XATTR or key == b"security.capability":
                    raise


def _write(file: int, piece: memoryview) -> None:
    written = os.write(file, piece)
    while written < len(piece):
        written += os.write(file, piece[written:])


def _override(entry: tar.Entry) -> bytes:
    text = b"%d:%d:%04o" % (entry.uid, entry.gid, entry.mode)
    if entry.kind in _KIND_NAMES:
        text += b":" + _KIND_NAMES[entry.kind].encode()
        if entry.kind != tar.FIFO:
            text += b"-%d-%d" % (entry.major, entry.minor)
    return text


def _clean(name: bytes) -> bytes:
    """The path below the layer's root, without empty components and dots.

    Raises:
        BadContent: it has `..` or a component that is too long.
    """
    if b"//" not in name and b"./" not in name and len(name) < 256 and name[:1] != b"/":
        path = name.rstrip(b"/")
        if path != b"." and path != b".." and not path.endswith(b"/.."):
            return path
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise BadContent(f"layer: entry {os.fsdecode(name[:80])!r} leads outside with '..'")
    if any(len(part) > 255 + len(whiteout.WHITEOUT_PREFIX) for part in parts):
        raise BadContent(f"layer: entry {os.fsdecode(name[:40])!r}… has a name that is too long")
    return b"/".join(parts)
