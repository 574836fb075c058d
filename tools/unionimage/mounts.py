"""Mounting a chain of layers at a directory: by unionfuse, or by kernel overlayfs where one may.

What is mounted is noted in the store (table `mounts`) and holds its layers; a note whose mount is
gone, with a reboot or by someone's umount(8), is dropped when it is seen. A lock per directory says
that one is being made there.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from unionfuse import syscalls
from unionimage.config import DRIVERS
from unionimage.digest import Digest
from unionimage.errors import Conflict, UserError
from unionimage.store import Image, Store
from unionimage.store.indexes import chain_index
from unionimage.store.locks import FileLock
from unionimage.tuples import NamedTuple

_MS_RDONLY = 1
_PAGE = 4095  # bytes of options that mount(2) takes
_PATIENCE = 30.0  # seconds; a daemon that still writes back a large mapped file takes a few


Start = Callable[[Sequence[str]], tuple[int, str]]
"""Runs the mount program with these words; its exit code, and what it said on stderr."""


class Mount(NamedTuple):
    """A mount of a chain.

    Attributes:
        image: the image id; None for a bare chain.
        step: of the image's history, None: all of it.
        upper: the writable directory; None: read-only.
        layers: base first.
    """

    target: Path
    driver: str
    image: Digest | None
    step: int | None
    upper: Path | None
    layers: tuple[Digest, ...]
    created: float


def mount_chain(
    store: Store,
    diff_ids: Sequence[Digest],
    target: Path,
    *,
    upper: Path | None = None,
    work: Path | None = None,
    driver: str | None = None,
    image: Image | None = None,
    step: int | None = None,
    options: Sequence[str] = (),
    register: bool = True,
    index: bool = True,
    start: Start | None = None,
) -> None:
    """Mount layers at a directory; usable when this returns.

    Args:
        diff_ids: base first; may be empty.
        target: an existing directory.
        upper: takes the changes; without it the mount is read-only.
        work: an empty directory on upper's file system; None: `upper` with `.work` added.
        driver: `fuse` or `overlay`; None: the configured one.
        options: more `-o` options for the driver.
        register: note it in the store, so that `mounts` lists it and its layers are held. Without,
            the caller holds the layers and unmounts by itself.
        index: with driver `fuse`, make the chain's lookup index if there is none yet.
        start: runs the mount program of driver fuse; None: `start_daemon`.

    Raises:
        UserError: the target is missing or in use, or the caller may not mount.
    """
    driver = driver or store.config.driver
    if driver not in DRIVERS:
        raise UserError(f"unknown driver {driver!r}; there are: {', '.join(DRIVERS)}")
    target = Path(os.path.realpath(target))
    if not target.is_dir():
        raise UserError(f"{target} is not a directory to mount at; make it first")
    lowers = store.chain_directories(diff_ids)
    upper = upper.absolute() if upper is not None else None
    identity = image.id if image is not None else None
    mount = Mount(target, driver, identity, step, upper, tuple(diff_ids), time.time())
    with _noted(store, mount, image) if register else nullcontext():
        pair = None if upper is None else (upper, _work_directory(upper, work))
        if driver == "overlay":
            _mount_overlay(store, lowers, pair, target, options)
        else:
            words = list(options)
            if index and not any(word.startswith("lookup_index") for word in words):
                found = chain_index(store, diff_ids)
                words += [f"lookup_index={_escaped(found, ',')}"] if found else []
            _mount_fuse(store, lowers, pair, target, words, start or start_daemon)


def unmount(store: Store, target: Path, *, lazy: bool = False) -> None:
    """Unmount a directory, wait until its daemon has put everything away, and drop its note.

    Args:
        lazy: detach now, end when the last user is gone; does not wait.

    Raises:
        UserError: it is in use, or neither a union nor a mount of this store.
    """
    from unionfuse import mounting

    target = Path(os.path.realpath(target))
    path = os.fsencode(target)
    mount = mounting.mount_at(path)
    is_union = mount is not None and mount.kind == mounting.FILE_SYSTEM_TYPE
    if not is_union and not _registered(store, target):
        raise UserError(f"{target}: no union is mounted there; 'unionfuse mounts' lists images")
    try:
        daemon = mounting.daemon_of(mount) if is_union and mount is not None else None
        mounting.detach(path, lazy)
        if daemon is not None and not lazy and not mounting.wait_for_end(daemon, _PATIENCE):
            remedy = "its upper directory must not be used before it has ended"
            raise UserError(f"{target}: unmounted, but the daemon is still at work; {remedy}")
    except mounting.MountError as error:
        raise UserError(str(error)) from None
    _unregister(store, target)


def _registered(store: Store, target: Path) -> bool:
    forget_dead(store)
    return store.database.row("SELECT 1 FROM mounts WHERE target = ?", (str(target),)) is not None


def mounts(store: Store) -> list[Mount]:
    """What is mounted, in order of the directories."""
    forget_dead(store)
    rows = store.database.rows(
        "SELECT target, driver, image, step, upper, layers, created FROM mounts ORDER BY target"
    )
    return [
        Mount(
            Path(target),
            driver,
            Digest(image) if image else None,
            step,
            Path(upper) if upper else None,
            tuple(map(Digest, layers.split())),
            created,
        )
        for target, driver, image, step, upper, layers, created in rows
    ]


def forget_dead(store: Store) -> None:
    """Drop the notes of mounts that are gone.

    One that was made in another mount namespace is believed, for it cannot be seen from here.
    """
    rows = store.database.rows("SELECT target, boot, namespace FROM mounts")
    if not rows:
        return
    from unionfuse import mounting

    here = _namespace()
    there = {os.fsdecode(mount.path) for mount in mounting.mounts()}
    for target, boot, namespace in rows:
        if boot != _boot() or (namespace == here and target not in there):
            _forget(store, Path(target), boot)


def _forget(store: Store, target: Path, boot: str) -> None:
    from unionfuse import mounting

    lock = FileLock.try_take(_lock_path(store, target))
    if lock is None:
        return  # it is being made
    try:
        if boot != _boot() or mounting.mount_at(os.fsencode(target)) is None:
            _unregister(store, target)
    finally:
        lock.release()


def _lock_path(store: Store, target: Path) -> Path:
    return store.root / "locks" / f"{Digest.of(os.fsencode(target)).hex}.mount"


@contextmanager
def _noted(store: Store, mount: Mount, image: Image | None) -> Iterator[None]:
    """Note a mount, hold its layers, have it made; if that fails, the note goes again."""
    forget_dead(store)
    lock = FileLock.try_take(_lock_path(store, mount.target))
    if lock is None:
        raise Conflict(f"{mount.target}: somebody is mounting there; try again")
    try:
        _register(store, mount, image)
        try:
            yield
        except BaseException:
            _unregister(store, mount.target)
            raise
    finally:
        lock.release()


def _register(store: Store, mount: Mount, image: Image | None) -> None:
    with store.database.write() as database:
        target = str(mount.target)
        if store.database.row("SELECT 1 FROM mounts WHERE target = ?", (target,)) is not None:
            remedy = f"run unionfuse umount {target}"
            raise Conflict(f"{target} has an image mounted already; {remedy}")
        owner = f"mount:{target}"
        store.hold_layers(owner, mount.layers)
        if image is not None:
            store.hold(owner, image)
        database.execute(
            "INSERT INTO mounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                target,
                mount.image,
                mount.step,
                mount.driver,
                None if mount.upper is None else str(mount.upper),
                " ".join(mount.layers),
                _boot(),
                _namespace(),
                mount.created,
            ),
        )


def _unregister(store: Store, target: Path) -> None:
    with store.database.write() as database:
        database.execute("DELETE FROM mounts WHERE target = ?", (str(target),))
        store.release(f"mount:{target}")


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> int:
    return os.stat("/proc/self/ns/mnt").st_ino


def _work_directory(upper: Path, work: Path | None) -> Path:
    if not upper.is_dir():
        raise UserError(f"the upper directory {upper} does not exist; make it first")
    path = work.absolute() if work is not None else upper.with_name(upper.name + ".work")
    path.mkdir(mode=0o700, exist_ok=True)
    return path


# --- drivers


def _escaped(path: Path, marks: str) -> str:
    text = os.fspath(path)
    for mark in "\\" + marks:
        text = text.replace(mark, "\\" + mark)
    return text


def _mount_fuse(
    store: Store,
    lowers: Sequence[Path],
    pair: tuple[Path, Path] | None,
    target: Path,
    options: Sequence[str],
    start: Start,
) -> None:
    directories = list(lowers) or [_empty(store, 1)]
    words = ["lowerdir=" + ":".join(_escaped(path, ":,") for path in directories)]
    if pair is not None:
        words += [f"upperdir={_escaped(pair[0], ',')}", f"workdir={_escaped(pair[1], ',')}"]
    if os.geteuid() != 0 and not any(word.startswith("xattr_permissions") for word in options):
        words.append("xattr_permissions=2")
    code, said = start(["-o", ",".join([*words, *options]), str(target)])
    if code:
        lines = said.strip().splitlines() or [f"{target}: its daemon ended and did not say why"]
        raise UserError(lines[-1].removeprefix("unionfuse: "))


def start_daemon(words: Sequence[str]) -> tuple[int, str]:
    """Run the mount program the quickest way; its exit code and what it said.

    A spawner forks the daemon. Without one it is a fork of this process, or a program of its own,
    and there is a spawner for the next time.
    """
    from unionfuse.daemon import spawner
    from unionimage import spawn

    with open(os.memfd_create("messages", os.MFD_CLOEXEC), "r+b") as messages:
        code = spawn.ask("mount", list(words), [messages.fileno()])
        if code is not None:
            messages.seek(0)
            return int(code), messages.read().decode(errors="replace")
    alone = threading.active_count() == 1
    answer = spawner.forked(words) if alone else start_program(words)
    spawn.start()
    return answer


def start_program(words: Sequence[str]) -> tuple[int, str]:
    """Run the mount program in a process of its own; its exit code and what it said."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-P", "-m", "unionfuse", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    return done.returncode, done.stderr.decode(errors="replace")


def _mount_overlay(
    store: Store,
    lowers: Sequence[Path],
    pair: tuple[Path, Path] | None,
    target: Path,
    options: Sequence[str],
) -> None:
    directories = list(lowers)
    while len(directories) < (2 if pair is None else 1):  # what overlayfs wants
        directories.append(_empty(store, len(directories)))
    opened: list[int] = []
    try:
        names = [_escaped(path, ":,") for path in directories]
        if sum(map(len, names)) + len(names) > _PAGE - 1024:
            opened = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in directories]
            names = [f"/proc/self/fd/{descriptor}" for descriptor in opened]
        words = ["lowerdir=" + ":".join(names)]
        if pair is not None:
            words += [f"upperdir={_escaped(pair[0], ',')}", f"workdir={_escaped(pair[1], ',')}"]
        if os.geteuid() != 0:
            words.append("userxattr")
        data = ",".join([*words, *options])
        if len(data) > _PAGE:
            raise UserError(f"{len(directories)} layers are too many for driver overlay; use fuse")
        flags = _MS_RDONLY if pair is None else 0
        syscalls.mount(b"overlay", os.fsencode(target), b"overlay", flags, os.fsencode(data))
    except OSError as error:
        remedy = "check the kernel's log (dmesg)"
        if error.errno == errno.EPERM:
            remedy = "it takes CAP_SYS_ADMIN; use --driver fuse"
        raise UserError(f"cannot mount overlay at {target}: {error.strerror}; {remedy}") from None
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _empty(store: Store, number: int) -> Path:
    """An empty directory to stand in for a layer."""
    path = store.root / "empty" / str(number)
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path
