"""Where steps are carried out: scratch directories, mounts of the stack so far, source trees.

All mounts are made in a mount namespace of the build's own: nobody else sees them, and the kernel
takes them away with the last process of the build.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unionfuse import syscalls
from unionimage.digest import Digest
from unionimage.dockerfile.ignore import Patterns
from unionimage.dockerfile.select import Tree
from unionimage.errors import UserError

if TYPE_CHECKING:
    from unionimage.dockerfile.helper import Helper
    from unionimage.store import Lease, Store

_MS_REC, _MS_SLAVE, _MS_SHARED = 0x4000, 0x80000, 0x100000


class Context:
    """The build context: an open directory, and the patterns of its `.dockerignore`."""

    def __init__(self, path: Path, ignored: Patterns, name: str = "the build context") -> None:
        self.path = path
        self.ignored = ignored
        self.name = name
        self.root = os.open(path, os.O_PATH | os.O_DIRECTORY)

    def tree(self) -> Tree:
        return Tree(self.root, self.ignored)

    def close(self) -> None:
        os.close(self.root)


class BuildLease:
    """A lease of the store that begins when something is staged: a cached build needs none."""

    def __init__(self, store: Store, purpose: str) -> None:
        self._store = store
        self._purpose = purpose
        self._lock = threading.Lock()
        self._seen: dict[Digest, None] = {}
        self._lease: Lease | None = None

    def begin(self) -> Lease:
        """The lease; it holds every layer that `has_layer` found.

        Raises:
            UserError: such a layer was removed in the meantime.
        """
        with self._lock:
            if self._lease is None:
                self._lease = self._store.lease(self._purpose)
                for diff_id in self._seen:
                    if self._lease.use_layer(diff_id) is None:
                        raise UserError(f"layer {diff_id} was removed meanwhile; build again")
            return self._lease

    def has_layer(self, diff_id: Digest) -> bool:
        """Whether a layer is there; it stays until the build ends, or the build says so."""
        if self._lease is not None:
            return self._lease.use_layer(diff_id) is not None
        found = self._store.has_layer(diff_id)
        if found:
            self._seen[diff_id] = None
        return found

    def scratch(self) -> Path:
        """A fresh directory on the store's file system, which goes with the lease."""
        return self.begin().scratch()

    def close(self) -> None:
        """End the lease, if it was begun."""
        if self._lease is not None:
            self._lease.end()


class Kitchen:
    """Hands out what steps need; used from several threads."""

    def __init__(
        self, store: Store, lease: BuildLease, context: Context, driver: str | None
    ) -> None:
        """Args: `driver` is fuse, overlay, or None: overlay for COPY, fuse for RUN."""
        self.store = store
        self.lease = lease
        self.context = context
        self.driver = driver
        self._lock = threading.Lock()
        self._helper: Helper | None = None
        self._rootless = "UNIONFUSE_ROOTLESS" in os.environ  # see container/rootless.py
        if self._rootless:  # owners live in xattrs, which unionfuse shows and kernel overlayfs not
            self.driver = "fuse"
        self._quick = "overlay"  # for a look or a few files

    def enter_private_namespace(self) -> None:
        """Leave the host's mount namespace; before the first mount and the first thread."""
        try:
            syscalls.unshare(syscalls.CLONE_NEWNS)
        except OSError as error:
            raise UserError(f"cannot make a mount namespace: {error.strerror}") from None
        try:
            syscalls.mount(b"none", b"/", b"none", _MS_REC | _MS_SLAVE, b"")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise UserError(
                "the root directory is no mount point, so what is mounted cannot be kept apart:"
                " make it one before the chroot (mount --bind DIRECTORY DIRECTORY)"
            ) from None
        # Shared with the namespaces of the containers: what is unmounted here goes there too.
        syscalls.mount(b"none", b"/", b"none", _MS_REC | _MS_SHARED, b"")

    def scratch(self, *names: str) -> Path:
        """A fresh directory on the store's file system, with directories in it."""
        path = self.lease.scratch()
        for name in names:
            (path / name).mkdir(mode=0o755)
        return path

    @contextlib.contextmanager
    def mounted(
        self, diff_ids: Sequence[Digest], *, upper: Path | None = None, driver: str | None = None
    ) -> Iterator[Path]:
        """The stack of these layers (base first) as a directory, writable where `upper` is given.

        An empty stack is its upper directory, or an empty directory.
        """
        from unionimage.mounts import mount_chain, unmount

        if not diff_ids and not self._rootless:
            yield upper or self.scratch()
            return
        place = self.scratch("merged", "work")
        target = place / "merged"
        wanted = driver or self.driver or self._quick

        options = ["volatile"] if upper is not None else []
        options += ["xattr_permissions=2"] if self._rootless else []

        def mount(driver: str) -> None:
            mount_chain(
                self.store,
                diff_ids,
                target,
                upper=upper,
                work=place / "work",
                driver=driver,
                options=options,
                register=False,
                index=False,  # it would be made for one step; what that reads is merged as it goes
                start=self._start_daemon,
            )

        try:
            mount(wanted)
        except UserError:
            if driver or self.driver or wanted == "fuse":
                raise
            self._quick = wanted = "fuse"  # such as a store that itself lies on an overlay
            mount(wanted)
        try:
            yield target
        finally:
            if wanted == "overlay":
                syscalls.umount(os.fsencode(target))
            else:
                unmount(self.store, target)

    @property
    def helper(self) -> Helper:
        """The process that mounts and cleans up for this build; started when first asked for."""
        from unionimage.dockerfile.helper import Helper

        with self._lock:
            if self._helper is None:
                self._helper = Helper(str(self.lease.scratch().parent))
            return self._helper

    def _start_daemon(self, words: Sequence[str]) -> tuple[int, str]:
        return self.helper.mount(words)

    def close(self) -> None:
        """No more steps."""
        with self._lock:
            if self._helper is not None:
                self._helper.close()
                self._helper = None

    @contextlib.contextmanager
    def tree(self, diff_ids: Sequence[Digest]) -> Iterator[Tree]:
        """The files of a stage or an image to copy from; owners are kept."""
        with self.mounted(diff_ids) as path:
            root = os.open(path, os.O_PATH | os.O_DIRECTORY)
            try:
                yield Tree(root, keeps_owners=True)
            finally:
                os.close(root)
