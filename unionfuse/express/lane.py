"""The express lane: reads the FUSE channel, and has each request answered where that is cheapest.

    /dev/fuse -> the compiled loop: answers from the lookup index, without the GIL
              -> Requests: asks the union, in the same thread, where that takes no time
              -> a thread that may wait: a big copy-up, a sync
              -> pyfuse3 behind a socket pair: the rest, unchanged

Interleaving: every thread of the lane may serve any request at any time. The union's own lock keeps
its steps together; it is never held here across anything that waits. The kernel serialises changes
of one directory, and sends RELEASE of a handle after everything else that uses it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from unionfuse import syscalls
from unionfuse.express import passthrough
from unionfuse.express._lane import NODE_HANDLE, Loop, can_use_rings
from unionfuse.express.lending import Lending
from unionfuse.express.messages import MALFORMED, Call
from unionfuse.express.passthrough import Passthrough
from unionfuse.express.requests import Requests
from unionfuse.options import MountOptions
from unionfuse.tree import xattrs
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire._attributes import Attributes
from unionfuse.wire.protocol import InitFlag, Opcode, Wanted

if TYPE_CHECKING:
    from unionfuse.pyfuse.eventloop import EventLoop
    from unionfuse.survival.survivor import Survivor

log = logging.getLogger(__name__)

_READERS = 2  # threads that read /dev/fuse: two are faster than one, more are not
_WAITERS = 4  # threads for what may take long
_SOCKET_BUFFER = 4 << 20
_LARGE = 1 << 20  # bytes
_ASKED_FOR = 64  # directories of upper that are watched for a second question
_MAX_WRITE = 1 << 18  # bytes of one request; each reader has a buffer of that size in memory
_MOST_SHARED_RINGS = 8  # each has a thread, and each thread of a daemon a slot of the intent log
_UNANSWERED = (Opcode.FORGET, Opcode.BATCH_FORGET)
_OPCODE_NAMES = {int(opcode): opcode.name for opcode in Opcode}

# What the end of a mount looks like, which is not a failure: fs/fuse/dev.c says ECONNABORTED where
# a request was just being read, fs/fuse/dev_uring.c ENOTCONN and ECANCELED.
_ENDS = (0, errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN, errno.ECANCELED)
_URING_REMEDY = "Linux 6.14 does, once root writes Y to /sys/module/fuse/parameters/enable_uring"

Work = Callable[[], bytes | None]


class Lane:
    """The lane of one mount. It serves as soon as it is made.

    pyfuse3, with trio the bigger half of what a mount needs, is started by the first request that
    is handed to it.
    """

    def __init__(
        self, fuse: int, union: Union, options: MountOptions, survivor: Survivor | None = None
    ) -> None:
        """
        Arguments:
            fuse: the mounted /dev/fuse; INIT is waiting in it, and answered here.
            survivor: where the mount is to outlive this process.

        Raises:
            protocol.ProtocolError: the kernel is too old.
        """
        self._fuse = fuse
        self._union = union
        self._options = options
        self._on_end: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        self._work: queue.SimpleQueue[tuple[int, Work] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._waiters = 0
        self._pending = 0  # works that are waiting or being done
        self._opened_nodes: dict[int, int] = {}  # node -> handle, for opens that the loop answered
        self._direct: dict[int, set[int]] = {}  # node -> handles that the loop reads by itself
        self._asked_for: set[int] = set()  # directories of upper
        self._lock = threading.Lock()  # of the fields above; never held across a call
        self._survivor = survivor
        self._as_on_disk = _shows_layers_as_they_are(options)
        self._index = union.index if self._as_on_disk else None
        self._loop = self._make_loop()
        self._lending = self._make_lending()
        self._methods = Requests(self, union).methods
        if survivor is not None:
            self._loop.stay_resident(_MAX_WRITE)
            survivor.settle(union)
            survivor.guard(self._methods)
        self._pair: socket.socket | None = None  # to pyfuse3
        self._pyfuse: EventLoop | None = None
        self._handshake()
        union.watcher = self
        if survivor is not None:
            survivor.ask_again(fuse)
        self._start_readers()

    def _make_loop(self) -> Loop:
        """The compiled loop, told of all that it may answer from."""
        options, survivor = self._options, self._survivor
        valid = min(int(options.timeout), protocol.FOREVER)
        with_xattrs = not (options.noxattrs or options.noacl)
        loop = Loop(self._fuse, self._serve, valid, with_xattrs, xattrs.unlabelled())
        if options.debug:
            loop.trace_to(self._trace)
        if self._index is not None:
            size = loop.size_of_marks(self._index.count)
            loop.use_index(self._index, survivor.marks(size) if survivor is not None else None)
        loop.use_tables(self._union.tree.tables, self._as_on_disk)
        loop.list_sparsely(self._list_again)
        if self._as_on_disk:
            size = loop.size_of_opens()
            opens = survivor.opens(size) if survivor is not None else None
            loop.open_here(self._size_to_pass_through(), opens)
        return loop

    def _make_lending(self) -> Lending | None:
        """Who lends the loop directories to make files in; None: the union makes all."""
        options = self._options
        writes = options.upperdir is not None and not options.read_only
        with_xattrs = not (options.noxattrs or options.noacl)
        if not (self._as_on_disk and with_xattrs and writes and syscalls.dies_young_at() >= 0):
            return None
        lending = Lending(self._fuse, self._union, min(int(options.timeout), protocol.FOREVER))
        self._loop.make_files(lending.files, lending.prepare)
        return lending

    def _start_readers(self) -> None:
        """Begin to serve, once INIT is answered."""
        survivor = self._survivor
        if self._options.spin != "off" and not self._has_rings:
            self._loop.spin(always=self._options.spin == "on")
        for cpu in range(_queues() if self._has_rings else 0):
            self._start(partial(self._serve_until_end, cpu), f"lane-ring-{cpu}")
        if self._has_rings and survivor is not None and survivor.taken_over:
            self._start(partial(self._stir, survivor.mount.path), "lane-stir")
        for number in range(1 if self._has_rings else _READERS):
            self._start(partial(self._serve_until_end, None), f"lane-{number}")

    def _handshake(self) -> None:
        if self._survivor is not None:
            request, granted = self._survivor.handshake()
            if request:  # the kernel has shaken hands with a daemon before this one
                self._use_passthrough(bool(granted & InitFlag.PASSTHROUGH))
                self._passthrough.take_over()
                self._borrow_again()
                self._has_rings = bool(granted & InitFlag.OVER_IO_URING)
                if self._has_rings:
                    self._share_rings(self._survivor)
                self._init = request
                return
            self._survivor.ask_again(self._fuse)
        request = os.read(self._fuse, 1 << 20)
        header = protocol.parse_header(request)
        # With ALLOW_IDMAP only requests that create something would say who asks.
        flags = (protocol.ALWAYS | InitFlag.SETXATTR_EXT) & ~InitFlag.ALLOW_IDMAP
        if self._options.noacl:
            flags &= ~InitFlag.POSIX_ACL
        if self._wants_rings():
            flags |= InitFlag.OVER_IO_URING
        if self._survivor is not None:
            flags |= InitFlag.HAS_RESEND
        depth = 0
        if self._passes_files_through() and passthrough.is_permitted():
            flags |= InitFlag.PASSTHROUGH
            depth = 1
        body = request[protocol.IN_HEADER.size :]
        wanted = Wanted(flags, _MAX_WRITE, max_stack_depth=depth)
        granted = wanted.granted(protocol.parse_init(body))
        self._use_passthrough(bool(granted & InitFlag.PASSTHROUGH))
        self._has_rings = bool(granted & InitFlag.OVER_IO_URING)
        if self._options.uring == "on" and not self._has_rings:
            log.warning("uring=on: the kernel does not offer it (%s)", _URING_REMEDY)
        if self._survivor is not None:
            self._survivor.negotiated(request, granted)
        answer = protocol.negotiate(body, wanted)
        os.write(self._fuse, protocol.reply(header.unique, answer))
        self._init = request

    def _use_passthrough(self, enabled: bool) -> None:
        lock = self._lending.files if self._lending is not None else None
        self._passthrough = Passthrough(self._fuse, enabled, self._union.tree.journal, lock)
        if self._lending is not None:
            self._lending.use(self._passthrough)

    def _wants_rings(self) -> bool:
        if self._options.uring == "off" or not can_use_rings():
            return False
        if self._survivor is None:
            return True
        # The kernel does not send again what is in a ring; taking it over has a hole.
        if self._options.uring != "on":
            return False
        if _queues() > _MOST_SHARED_RINGS:
            log.warning("uring=on: with a keeper only up to %d processors", _MOST_SHARED_RINGS)
            return False
        try:
            self._share_rings(self._survivor)
        except OSError as error:
            log.warning("uring=on: with a keeper not here: %s", error.strerror)
            return False
        return True

    def _share_rings(self, survivor: Survivor) -> None:
        """Have the rings' buffers outlive this process, or go on with those that did."""
        queues = _queues()
        memory = survivor.rings(self._loop.size_of_rings(queues))
        try:
            self._loop.share_rings(memory, queues, survivor.taken_over)
        finally:
            os.close(memory)

    def _stir(self, mountpoint: bytes) -> None:
        """Ask for something on each processor, once its ring is there.

        What was asked while nobody served is not handed to a ring that is registered anew, but to
        one that answers something.
        """
        queues = _queues()
        while self._loop.registered() < queues:
            if self._ended.wait(0.001):
                return
        for cpu in range(queues):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {cpu})
                os.statvfs(mountpoint)

    def _passes_files_through(self) -> bool:
        if self._options.upperdir is None:
            return self._options.passthrough == "auto"  # "upper" means no lower files
        return self._options.passthrough != "off"

    def _size_to_pass_through(self) -> int:
        """Lower files from this size on are passed through; to open a small one costs more."""
        passes = self._options.upperdir is None and self._passes_files_through()
        return _LARGE if passes and passthrough.is_permitted() else 1 << 63

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have a function called, from any thread, once the mount has ended."""
        self._on_end = callback
        if self._ended.is_set():
            callback()

    @property
    def failed(self) -> bool:
        """Whether serving ended by a failure of our own."""
        return self._pyfuse is not None and self._pyfuse.failed

    @property
    def idle(self) -> bool:
        """Whether nothing is being done, and what comes next is seen in /dev/fuse."""
        return not self._pending and not self._has_rings

    def counts(self) -> dict[str, int]:
        """Requests by opcode."""
        return {
            _OPCODE_NAMES.get(opcode, f"OPCODE_{opcode}"): here + python
            for opcode, (here, python) in self._loop.counts().items()
        }

    def handed(self) -> int:
        """How many of them were answered by Python."""
        return sum(python for _, python in self._loop.counts().values())

    def close(self) -> None:
        """End the threads and close the channel; call it once the mount has ended."""
        self._loop.stop()
        if self._lending is not None:
            self._lending.files.stop()
        self._union.tree.tables.stop()  # they write to a memory that is about to go
        for _ in range(_WAITERS):
            self._work.put(None)
        if self._pair is not None:
            self._pair.close()
        if self._pyfuse is not None:
            self._pyfuse.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1)
        self._passthrough.close()
        os.close(self._fuse)

    # --- threads ------------------------------------------------------------------------------

    def _start(self, target: Callable[[], None], name: str) -> None:
        def run() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            target()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve_until_end(self, cpu: int | None) -> None:
        """Read /dev/fuse, or be the ring of one CPU, until the mount has ended."""
        slot = self._survivor.slot() if self._survivor is not None else 0
        failure = self._loop.run(slot) if cpu is None else self._loop.run_ring(cpu, slot)
        if failure not in _ENDS:
            what = "reading /dev/fuse" if cpu is None else f"io_uring queue {cpu}"
            log.error("the express lane ends: %s: %s", what, os.strerror(failure))
        self._end()

    def _end(self) -> None:
        with self._lock:
            first = not self._ended.is_set()
            self._ended.set()
        if first:
            self._on_end()

    def later(self, unique: int, work: Work) -> None:
        """Do something that takes long, in a thread that may wait, and answer with its result."""
        with self._lock:
            self._pending += 1
            start = self._waiters < min(self._pending, _WAITERS)
            self._waiters += start
        self._work.put((unique, work))
        if start:
            self._start(self._wait, f"lane-wait-{self._waiters}")

    def _wait(self) -> None:
        while True:
            item = self._work.get()
            if item is None:
                return
            unique, work = item
            result = _answer(work)
            with self._lock:
                self._pending -= 1
            if result is not None:
                self._reply(unique, result)

    def _reply(self, unique: int, result: bytes | int) -> None:
        if isinstance(result, int):
            self._loop.reply(unique, result, b"")
        else:
            self._loop.reply(unique, 0, result)

    # --- one request --------------------------------------------------------------------------

    def _serve(
        self, opcode: int, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes
    ) -> bytes | int | None:
        call = Call(opcode, unique, node, uid, gid, pid, body)
        method = self._methods.get(opcode)
        if method is None:
            self.relay(call)
            return None
        result: bytes | int | None
        try:  # not by _answer: this is what most of the time goes into
            result = method(call)
        except Exception as error:
            result = _number(error)
        if self._options.debug:
            self._trace(opcode, node, body, result if isinstance(result, int) else 0)
        return None if opcode in _UNANSWERED else result

    def _trace(self, opcode: int, node: int, body: bytes, error: int) -> None:
        """Log one request, for `-d`."""
        name = _OPCODE_NAMES.get(opcode, f"OPCODE_{opcode}")
        shown = os.strerror(error) if error else "answered"
        log.debug("%s node=%d %r: %s", name, node, body[:300], shown)

    def relay(self, call: Call) -> None:
        """Hand a request to pyfuse3, which answers it in its own time."""
        header = protocol.IN_HEADER.pack(protocol.IN_HEADER.size + len(call.body), *call[:6], 0, 0)
        with self._lock:
            pair = self._pair = self._pair or self._start_pyfuse()
        pair.send(header + call.body)

    def _start_pyfuse(self) -> socket.socket:
        """Start pyfuse3 behind a pair of sockets; returns our end."""
        from unionfuse.pyfuse.eventloop import EventLoop

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        ours.send(protocol.init_for_libfuse(self._init))
        self._start(partial(self._relay_back, ours), "lane-relay")
        self._pyfuse = EventLoop(
            theirs.detach(), self._union, self._options, lambda: None, self._end
        )
        return ours

    def _relay_back(self, pair: socket.socket) -> None:
        """Carry pyfuse3's replies to the kernel."""
        while True:
            try:
                reply = pair.recv((1 << 20) + 4096)
            except OSError:
                return
            if not reply:
                return
            _, error, unique = protocol.OUT_HEADER.unpack_from(reply)
            if unique != protocol.LIBFUSE_INIT_UNIQUE:
                self._loop.reply(unique, -error, reply[protocol.OUT_HEADER.size :])

    # --- what Requests asks of the lane -------------------------------------------------------

    def listed(self, call: Call, cookie: int, size: int) -> bytes | None:
        """What the loop lists of a directory, merged now if it was not. The lock is held."""
        self._union.tree.load_for_listing(call.node)
        return self._loop.list_from_tables(call.node, cookie, size, call.pid)

    def looked_up(self, parent: int, name: bytes) -> bytes | None:
        """What the loop finds in a directory that only now was merged. The lock is held."""
        if name in (b".", b"..") or not self._union.tree.merging.merge_below(parent):
            return None
        return self._loop.look_up_in_tables(parent, name)

    def keep_statfs(self, answer: bytes) -> None:
        """Let the loop answer STATFS with this for a moment."""
        self._loop.keep_statfs(answer)

    def opened(self, node: int, handle: int, made: Attributes | None = None) -> tuple[int, int]:
        """(open_flags, backing id) for the reply to an OPEN.

        Arguments:
            made: of a file that has just been made, and is open for writing only.
        """
        with self._union.lock:  # a copy-up in between would change the file
            descriptor = self._union.files.descriptor(handle)
            self._loop.opened_elsewhere(node)
            if made is None:
                self._loop.let_go(node)
            elif self._as_on_disk:
                with contextlib.suppress(OSError):  # without it Python is asked
                    self._loop.hold(node, os.dup(descriptor), made.ino)
            # The loop's own opens of the node go through the page cache.
            settled = self._union.is_settled(node) and not self._loop.opened_here(node)
            return self._passthrough.opened(node, handle, descriptor, settled)

    def released(self, node: int, handle: int) -> None:
        """A handle is about to be closed."""
        self._passthrough.released(node, handle)
        self._loop.let_go(node)
        self._loop.read_from(handle, -1)
        if node not in self._direct:
            return
        with self._lock:
            handles = self._direct.get(node)
            if handles is not None:
                handles.discard(handle)
                if not handles:
                    del self._direct[node]

    def union_handle(self, handle: int) -> int:
        """The union's handle for one that the kernel has: it may be one that the loop gave."""
        if not handle & NODE_HANDLE:
            return handle
        node = handle & ~NODE_HANDLE
        with self._union.lock:
            found = self._opened_nodes.get(node)
            if found is None:
                found = self._opened_nodes[node] = self._union.open(node, os.O_RDONLY)
                self._union.tree.journal.lent(found)
                self._loop.read_node_from(node, self._union.files.pin(found))
            return found

    def _borrow_again(self) -> None:
        """Take the handles behind the loop's opens from the daemon before this one."""
        for handle in self._union.tree.journal.handles():
            if handle.lent:
                self._opened_nodes[handle.node] = handle.number
                self._loop.read_node_from(handle.node, self._union.files.pin(handle.number))

    def released_here(self, handle: int) -> None:
        """The last open of a node that the loop has answered may be gone."""
        node = handle & ~NODE_HANDLE
        with self._union.lock:
            if not self._loop.opened_here(node) and node in self._opened_nodes:
                self._loop.read_node_from(node, -1, held=False)
                self._union.release(self._opened_nodes.pop(node))

    def asked_for(self, node: int) -> None:
        """Let the loop answer for a directory of upper that is asked for again.

        The kernel asks for a directory's attributes after every change of its names.
        """
        if not self._as_on_disk:
            return
        with self._union.lock:
            if node not in self._asked_for:
                if len(self._asked_for) >= _ASKED_FOR:
                    self._asked_for.clear()
                self._asked_for.add(node)
                return
            with contextlib.suppress(OSError):  # too many files are open: we are asked again
                found = self._union.directory_in_upper(node)
                if found is not None:
                    directory, inode, alone = found
                    links = 0 if alone else 1  # see attributes.shown
                    lent = self._lending is not None and self._lending.may_have(node)
                    self._loop.show(node, os.dup(directory), inode, links, alone, lent)

    def hide(self, node: int) -> None:
        """Have Python asked about a directory of upper."""
        self._loop.hide(node)

    def forgotten(self, node: int) -> None:
        """The kernel has dropped a node; its id may become another file's."""
        self._loop.hide(node)
        self._loop.has_no_capabilities(node, False)

    def has_no_capabilities(self, node: int, value: bool) -> None:
        """Let the loop answer for a new file that it has no `security.capability`, or no longer."""
        if not value or not (self._options.noxattrs or self._options.noacl):
            self._loop.has_no_capabilities(node, value)

    def read_directly(self, node: int, handle: int, descriptor: int) -> None:
        """Let the loop answer READ of this handle from now on; not without a descriptor."""
        if descriptor < 0:
            return
        with self._lock:
            self._direct.setdefault(node, set()).add(handle)
        self._loop.read_from(handle, descriptor)

    def _list_again(self, directories: list[int]) -> None:
        """Have the kernel drop its listings of directories; not while a request is answered."""

        def drop() -> None:
            for node in directories:
                body = protocol.NOTIFY_INVAL_INODE_OUT.pack(node, 0, 0)
                with contextlib.suppress(OSError):  # the kernel does not know it any more
                    os.write(self._fuse, protocol.notification(protocol.Notify.INVAL_INODE, body))

        self.later(0, drop)

    # --- what the union tells -----------------------------------------------------------------

    def changed(self, node: int) -> None:
        """A node's answer is not the index's any more (see union.Watcher)."""
        if node in self._direct:
            with self._lock:
                handles = self._direct.pop(node, ())
            for handle in handles:
                self._loop.read_from(handle, -1)
        if self._loop.shows(node) and self._union.is_deleted(node):
            self._loop.hide(node)
        if self._index is not None and not self._loop.is_changed(node):
            self._loop.changed(node, [parent for parent, _ in self._index.names(node)])
        if self._loop.opened_here(node):
            # Open it while it can still be found; the file may be another one than before.
            with contextlib.suppress(OSError):
                opened = self.union_handle(NODE_HANDLE | node)
                self._loop.read_node_from(node, self._union.files.pin(opened))

    def opens_by_itself(self, value: bool) -> None:
        """Whether the loop may open files (see union.Watcher)."""
        for node in self._loop.open_no_more(not value):
            if not value:
                with contextlib.suppress(OSError):
                    self.union_handle(NODE_HANDLE | node)


def _queues() -> int:
    """How many rings the kernel waits for: one for each CPU that there may ever be."""
    with open("/sys/devices/system/cpu/possible") as file:
        spans = [span.split("-") for span in file.read().strip().split(",")]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def _shows_layers_as_they_are(options: MountOptions) -> bool:
    """Whether owners, modes and link counts in the mount are those on disk."""
    return not (
        options.uidmapping
        or options.gidmapping
        or options.squash_to_uid is not None
        or options.squash_to_gid is not None
        or options.xattr_permissions
        or options.static_nlink
        or options.noacl
        or options.xino == "off"
    )


def _answer(work: Work) -> bytes | int | None:
    """The body of a reply, or an errno: whatever happens, the caller gets an answer."""
    try:
        return work()
    except Exception as error:
        return _number(error)


def _number(error: Exception) -> int:
    """The errno that a request is answered with that has raised this."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, MALFORMED):
        return errno.EINVAL
    log.error("a request failed; the caller got EIO", exc_info=error)
    return errno.EIO
