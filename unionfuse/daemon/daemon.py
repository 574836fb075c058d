"""The life of one mount: check, lock, mount, detach, serve, unmount, clean up.

Everything that can be refused is refused before the mount exists.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from unionfuse import mounting, syscalls
from unionfuse.daemon.logs import log_to
from unionfuse.daemon.serving import SIGNALS, Server
from unionfuse.express.lane import Lane
from unionfuse.index.lookup import LookupIndex, LookupIndexError
from unionfuse.layers.layer import LayerError, LayerStack
from unionfuse.options import Invocation, MountOptions
from unionfuse.pyfuse.channel import Channel
from unionfuse.survival.keeping import KEEPER, Keeping, stored_descriptors
from unionfuse.survival.memory import SharedMemory, TakeOverError
from unionfuse.union import Union
from unionfuse.wire import protocol

if TYPE_CHECKING:
    from unionfuse.survival.survivor import Survivor

_LOCK_PATIENCE = 5.0  # seconds that a daemon which is just ending may take


def run(invocation: Invocation) -> int:
    """Mount and serve; the exit code of the command.

    In the background (the default) it returns 0 once the mount answers; in the foreground when
    the mount has ended. 1 means that nothing was mounted, and that the reason was printed.
    """
    for warning in invocation.warnings:
        _say(warning)
    keeping = Keeping.join()
    if keeping is not None:
        return _live(invocation, keeping.ready, keeping)
    if invocation.options.foreground:
        stored = stored_descriptors() if _wants_keeper(invocation.options) else {}
        _close_inherited(*stored.values())
        return _live_kept(invocation, lambda: None, -1, stored)
    return _run_detached(invocation)


def _live_kept(
    invocation: Invocation,
    ready: Callable[[], None],
    waiting: int,
    stored: dict[str, int] | None = None,
) -> int:
    """Live, with a keeper for a parent where one is wanted.

    Arguments:
        waiting: a descriptor that the keeper, in place of `ready`, writes a newline to; -1: none.
        stored: what a service manager kept of the mount.
    """
    options = invocation.options
    if not _wants_keeper(options):
        return _live(invocation, ready)
    log = b"-" if options.foreground else b""
    if options.log is not None:
        log = os.path.join(os.getcwdb(), options.log)
    mountpoint = SharedMemory.mountpoint_in(stored["memory"]) if stored else b""
    keeping = Keeping.begin(invocation.words, waiting, log, stored, mountpoint)

    def ready_and_quiet() -> None:
        keeping.ready()
        if not options.foreground:
            _redirect(1, 2)

    return _live(invocation, ready_and_quiet, keeping)


_RESENDS = (6, 9)  # the Linux that sends unanswered requests again


def _wants_keeper(options: MountOptions) -> bool:
    """Whether another process is to keep the mount; by default where that can work."""
    if options.keeper is not None:
        return options.keeper
    if not options.express or options.uring == "on" or options.debug:
        return False
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if version is None or (int(version[1]), int(version[2])) < _RESENDS:
        return False
    # As what daemons and keeper are started.
    needed = os.fsencode(sys.executable), KEEPER
    return all(os.access(program, os.X_OK, effective_ids=True) for program in needed)


def _run_detached(invocation: Invocation) -> int:
    """Fork; the child serves, the parent waits until the child says that it does."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            _close_inherited(writer)
            _redirect(0)

            def ready() -> None:
                try:
                    os.write(writer, b"\n")
                except BrokenPipeError:  # whoever asked for the mount did not wait for it
                    os.kill(os.getpid(), signal.SIGTERM)
                os.close(writer)
                _redirect(1, 2)

            code = _live_kept(invocation, ready, writer)
        except mounting.MountError as refusal:
            _say(str(refusal))
        except Exception:
            logging.getLogger(__name__).exception("the daemon ends")
        finally:
            os._exit(code)
    os.close(writer)
    if not os.read(reader, 1):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
    try:
        os.stat(invocation.mountpoint)
    except OSError as error:
        _say(f"{os.fsdecode(invocation.mountpoint)}: the mount does not answer: {error.strerror}")
        return 1
    return 0


def _live(invocation: Invocation, ready: Callable[[], None], keeping: Keeping | None = None) -> int:
    """The daemon itself, from checks to clean-up; `ready` is called once the mount is served."""
    options = _anchored(invocation.options, keeping.cwd if keeping else os.getcwdb())
    survivor = None
    if keeping is not None:
        from unionfuse.survival.survivor import Survivor

        try:
            survivor = Survivor(keeping)
        except TakeOverError as error:
            keeping.crash_ends(f"what the last daemon left cannot be used: {error}")
            return 1
        if survivor.taken_over:
            return _take_over(options, survivor, ready)
    try:
        mountpoint = mounting.resolve_mountpoint(invocation.mountpoint)
        log = _open_log(options)
        os.chdir("/")
        os.umask(0)
        _raise_limits()
        locks = _lock(options)
        union = _open_union(options, survivor)
    except (LayerError, mounting.MountError) as refusal:
        _say(str(refusal))
        return 1
    log_to(log, options)
    # Until the server listens, a signal waits: ended in between, the mount would stay behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        channel = mounting.attach(mountpoint, options)
    except mounting.MountError as refusal:
        union.close()
        _say(str(refusal))
        return 1
    mount = mounting.attached(mountpoint)
    if survivor is not None:
        for name, lock in zip(("upper", "work"), locks, strict=False):
            survivor.keep(name, lock)
        survivor.mounted(channel, mount)
    try:
        return _serve(channel, union, options, mount, ready, survivor)
    except protocol.ProtocolError as error:
        mounting.withdraw(mount)
        _say(f"{os.fsdecode(mountpoint)}: {error}; run a newer kernel")
        return 1
    except Exception:
        mounting.withdraw(mount)
        raise
    finally:
        union.close()
        for lock in locks:
            os.close(lock)


def _serve(
    channel: int,
    union: Union,
    options: MountOptions,
    mount: mounting.Mount,
    ready: Callable[[], None],
    survivor: Survivor | None = None,
) -> int:
    """Answer INIT and serve until the end; `ready` is called once the mount answers."""
    door: Lane | Channel
    if options.express:
        door = Lane(channel, union, options, survivor)
        if survivor is not None:
            survivor.refresh(union, channel)
    else:
        door = Channel(channel, union, options)
    make_room = fall_asleep = None
    if survivor is not None:
        make_room = functools.partial(survivor.make_room, union)
    if survivor is not None and isinstance(door, Lane):
        fall_asleep = functools.partial(_fall_asleep, survivor, door, union)
    return Server(door, union, options, mount, make_room, fall_asleep).serve(ready)


def _fall_asleep(survivor: Survivor, lane: Lane, union: Union) -> None:
    if lane.idle:
        survivor.fall_asleep(union)


def _take_over(options: MountOptions, survivor: Survivor, ready: Callable[[], None]) -> int:
    """Go on where a daemon ended that served this mount; nobody but this process serves it.

    No path is followed here: it might lead into the mount, and wait for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.chdir("/")
    os.umask(0)
    _raise_limits()
    log_to(_open_log(options), options)
    log = logging.getLogger(__name__)
    channel = survivor.kept("fuse")
    assert channel is not None
    try:
        upper, work = survivor.kept("upper"), survivor.kept("work")
        if upper is not None and work is not None:
            paths = syscalls.proc_path(upper), syscalls.proc_path(work)
            options = options._replace(upperdir=paths[0], workdir=paths[1])
        union = _open_union(options, survivor)
        try:
            return _serve(channel, union, options, survivor.mount, ready, survivor)
        finally:
            union.close()
    except (LayerError, TakeOverError) as error:
        log.error("this daemon cannot go on: %s", error)
        survivor.gives_up(str(error))
        return 1


# --- checks and preparations ----------------------------------------------------------------


def _anchored(options: MountOptions, here: bytes) -> MountOptions:
    """The same options with absolute paths: the daemon leaves the working directory, `here`."""

    def anchor(path: bytes | None) -> bytes | None:
        return None if path is None else os.path.join(here, path)

    return options._replace(
        lowerdir=tuple(os.path.join(here, path) for path in options.lowerdir),
        upperdir=anchor(options.upperdir),
        workdir=anchor(options.workdir),
        lookup_index=anchor(options.lookup_index),
        log=anchor(options.log),
    )


def _open_union(options: MountOptions, survivor: Survivor | None = None) -> Union:
    if survivor is None:
        stack = LayerStack.open(options.lowerdir)
        index = _open_index(stack, options)
    else:
        stack, index = _open_kept(options, survivor)
    journal, taken_over = None, False
    if survivor is not None:
        journal, taken_over = survivor.journal, survivor.taken_over
    try:
        return Union(stack, options, index, journal, taken_over)
    except BaseException:
        stack.close()
        raise


def _open_kept(options: MountOptions, survivor: Survivor) -> tuple[LayerStack, LookupIndex | None]:
    """Layers and index: those of the daemon before, or new ones that the next is to have."""
    stack = survivor.layers(options)
    if survivor.taken_over:
        index = survivor.kept("index")
        if index is None:
            return stack, None
        return stack, _open_index(stack, options._replace(lookup_index=syscalls.proc_path(index)))
    found = _open_index(stack, options)
    if found is not None and options.lookup_index is not None:
        descriptor = os.open(options.lookup_index, os.O_RDONLY | os.O_CLOEXEC)
        survivor.keep("index", descriptor)
        os.close(descriptor)
    return stack, found


def _open_index(stack: LayerStack, options: MountOptions) -> LookupIndex | None:
    """The lookup index of the layers; None, and a warning, where it cannot be used."""
    if options.lookup_index is None:
        return None
    try:
        index = LookupIndex.open(options.lookup_index)
        index.check([os.stat(layer.descriptor) for layer in stack.layers])
    except LookupIndexError as error:
        _say(f"the lookup index {error}; the layers are read instead")
        return None
    return index


def _lock(options: MountOptions) -> list[int]:
    """Lock upper and work for the life of this process: two daemons would ruin both."""
    if options.upperdir is None or options.workdir is None:
        return []
    if os.path.realpath(options.upperdir) == os.path.realpath(options.workdir):
        reason, remedy = "upper and work are the same directory", "put them side by side"
        raise LayerError(options.workdir, reason, remedy)
    deadline = time.monotonic() + _LOCK_PATIENCE
    return [_lock_directory(path, deadline) for path in (options.upperdir, options.workdir)]


def _lock_directory(path: bytes, deadline: float) -> int:
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        remedy = "upperdir and workdir must be directories that exist and that you may write to"
        raise LayerError(path, f"cannot be opened: {error.strerror}", remedy) from None
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return directory
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(directory)
                remedy = "unmount the other mount first, or use another directory"
                raise LayerError(path, "in use by another mount", remedy) from None
            time.sleep(0.02)


def _open_log(options: MountOptions) -> int | None:
    """The descriptor of the log file; None for the terminal or syslog."""
    if options.log is None:
        return None
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(options.log, flags, 0o644)
    except OSError as error:
        remedy = "name a file that can be written"
        raise mounting.MountError(options.log, f"cannot log: {error.strerror}", remedy) from None


_OPEN_FILES = 1 << 20  # what the kernel allows at most unless told otherwise (fs.nr_open)


def _raise_limits() -> None:
    """As many open files as can be had: each one that is open in the mount may need one here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    except (OSError, ValueError):  # without CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _close_inherited(*keep: int) -> None:
    """A descriptor that a caller forgot to close would stay open as long as the mount."""
    first = 3
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _redirect(*descriptors: int) -> None:
    """Point standard streams to nowhere, so that no caller waits for them to close."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        reason = f"cannot be opened: {error.strerror}"
        raise mounting.MountError(b"/dev/null", reason, "a container needs the device") from None
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _say(message: str) -> None:
    line = f"unionfuse: {message}\n".encode("utf-8", "surrogateescape")
    os.write(2, line.replace(b"\n", b" ").rstrip() + b"\n")
