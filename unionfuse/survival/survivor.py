"""What one daemon of a mount with a keeper has: the line to it, the memory, journal and intents."""

from __future__ import annotations

import logging
import mmap
import os

from unionfuse import mounting
from unionfuse.express.messages import Method
from unionfuse.layers.layer import LayerError, LayerStack
from unionfuse.options import MountOptions
from unionfuse.survival import stacking
from unionfuse.survival.intents import GUARDED, IntentLog
from unionfuse.survival.journal import SharedJournal
from unionfuse.survival.keeping import SLEEP, UPGRADE, Keeping
from unionfuse.survival.memory import SharedMemory, TakeOverError, Word
from unionfuse.survival.settling import Settling
from unionfuse.union import Union
from unionfuse.wire import protocol
from unionfuse.wire.protocol import InitFlag

log = logging.getLogger(__name__)

_MOST_OPEN = 500  # files, to fall asleep with
_PATIENCE = 2.0  # seconds that an upgrade waits for a change that is going on
_TIMEOUT = "/proc/sys/fs/fuse/default_request_timeout"


class Survivor:
    """One daemon's part in the survival of its mount.

    Attributes:
        taken_over: another daemon has served the mount before.
        journal: to be given to the union.
    """

    def __init__(self, keeping: Keeping) -> None:
        """Raises TakeOverError where the daemon before this one left nothing that can be used."""
        self._keeping = keeping
        self._kept = keeping.kept
        self.taken_over = "fuse" in self._kept
        self._has_asked = False
        if self.taken_over:
            if "memory" not in self._kept:
                raise TakeOverError("it died before it served")
            self._memory = SharedMemory.take_over(self._kept["memory"])
        else:
            self._memory = SharedMemory.create()
            keeping.keep("memory", self._memory.descriptor)
        self.journal = SharedJournal(self._memory, keeping)

    # --- what the daemon before left ---------------------------------------------------------

    @property
    def mount(self) -> mounting.Mount:
        """The mount, if another daemon has made it."""
        memory = self._memory
        return mounting.Mount(memory.device, memory.mountpoint, mounting.FILE_SYSTEM_TYPE)

    def kept(self, name: str) -> int | None:
        """A descriptor that was kept, for the caller from now on."""
        return self._kept.pop(name, None)

    def keep(self, name: str, descriptor: int) -> None:
        """Have a descriptor kept for the next daemon."""
        self._keeping.keep(name, descriptor)

    def mounted(self, fuse: int, mount: mounting.Mount) -> None:
        """Tell the keeper of the mount: from now on a dead daemon is replaced."""
        self._memory.mountpoint, self._memory.device = mount.path, mount.device
        self._keeping.serves(mount.path, mount.device)
        self._keeping.keep("fuse", fuse)
        try:
            with open(_TIMEOUT) as setting:
                seconds = int(setting.read())
        except OSError:
            return
        if seconds:
            text = "fs.fuse.default_request_timeout is %d s: the kernel ends the mount if a daemon"
            log.warning(text + " cannot be replaced sooner", seconds)

    # --- for the lane ------------------------------------------------------------------------

    def settle(self, union: Union) -> None:
        """Make the union what the kernel takes it for; before anything is served."""
        self._intents = IntentLog(self._memory, union)
        deleted = {name: self._kept.pop(name) for name in list(self._kept) if name[:5] == "node-"}
        Settling(union, self.journal, self._intents).run(deleted)

    def handshake(self) -> tuple[bytes, InitFlag]:
        """The kernel's INIT request, and the flags that it was granted; empty for a new mount."""
        request, flags = self._memory.init()
        return request, InitFlag(flags)

    def negotiated(self, request: bytes, granted: InitFlag) -> None:
        """Note the handshake for daemons to come, and whether there can be any."""
        self._memory.keep_init(request, int(granted))
        if not granted & InitFlag.HAS_RESEND:
            reason = "this kernel does not send requests again (Linux 6.9 and later do)"
            log.warning("a crash of the daemon will end this mount: %s", reason)
            self._keeping.crash_ends(reason)

    def ask_again(self, fuse: int) -> None:
        """Have the kernel send what was not answered. Once, before anything is read."""
        if self.taken_over and not self._has_asked:
            self._has_asked = True
            os.write(fuse, protocol.notification(protocol.Notify.RESEND, b""))

    def marks(self, size: int) -> mmap.mmap:
        """Bytes that the next daemon will have as this one leaves them: zeros in a new mount."""
        return self._kept_bytes("marks", size, "the lookup index")

    def opens(self, size: int) -> mmap.mmap:
        """The same, for what the compiled loop notes of open files."""
        return self._kept_bytes("opens", size, "unionfuse")

    def _kept_bytes(self, name: str, size: int, cause: str) -> mmap.mmap:
        descriptor = self._kept_memory(name, size, cause)
        try:
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def rings(self, size: int) -> int:
        """A descriptor of the memory that the buffers of io_uring are in, for the caller."""
        return self._kept_memory("rings", size, "the number of processors")

    def _kept_memory(self, name: str, size: int, cause: str) -> int:
        """Memory that the daemons of a mount share; `cause` is what its size follows from."""
        descriptor = self.kept(name)
        if descriptor is None:
            descriptor = os.memfd_create(f"unionfuse-{name}", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
            self.keep(name, descriptor)
        if os.fstat(descriptor).st_size != size:
            raise TakeOverError(f"{cause} is another one")
        return descriptor

    def slot(self) -> int:
        """The offset of the running thread's slot in the intent log."""
        return self._intents.own_place()

    def guard(self, methods: dict[int, Method]) -> None:
        """Have each request that must not be done twice done once."""
        for opcode in GUARDED:
            if opcode in methods:
                methods[opcode] = self._intents.guarded(opcode, methods[opcode])

    # --- the end -----------------------------------------------------------------------------

    def ready(self) -> None:
        """Tell that the mount answers."""
        self._keeping.ready()

    def gives_up(self, reason: str) -> None:
        """Tell that this mount cannot go on."""
        self._keeping.crash_ends(reason)

    def make_room(self, union: Union) -> None:
        """End this process, between two changes: the keeper starts the installed version.

        Does not end where other layers are wished and cannot be had; the wish has the answer then.
        """
        held = union.lock.acquire(timeout=_PATIENCE)
        wish = stacking.read_wish(self._wish)
        if wish is not None and not wish.answer:
            try:
                stacking.restack(union, self._stack, wish, self._keeping)
            except (LayerError, OSError) as error:
                answer = str(error)
                if isinstance(error, OSError):
                    log.exception("the layers stay as they are")
                    answer = f"{error.strerror} in its daemon; see the mount's log"
                stacking.write(self._wish, wish._replace(answer=answer))
                if held:
                    union.lock.release()
                return
        logging.shutdown()
        os._exit(UPGRADE)

    def fall_asleep(self, union: Union) -> None:
        """End this process, between two changes: the keeper starts another when there is a request.

        Does not end where no other could take over, or would have much to open.
        """
        resends = self.handshake()[1] & InitFlag.HAS_RESEND
        if self._memory.words[Word.FULL] or not resends or union.status()[1] > _MOST_OPEN:
            return
        if union.lock.acquire(blocking=False):
            logging.shutdown()
            os._exit(SLEEP)

    # --- layers ------------------------------------------------------------------------------

    def layers(self, options: MountOptions) -> LayerStack:
        """The layers: those of the daemon before, or new ones that the next is to have.

        Raises LayerError, TakeOverError.
        """
        if self.taken_over:
            record, wish = self.kept("stack"), self.kept("wish")
            if record is None or wish is None:
                raise TakeOverError("what its layers were is not known")
            self._wish = wish
            self._stack = stacking.read_stack(record)
            os.close(record)
            keys = self._stack.keys
            kept = [self.kept(stacking.kept_name(key)) for key in keys]
            descriptors = [descriptor for descriptor in kept if descriptor is not None]
            if len(descriptors) != len(kept):
                raise TakeOverError("a layer is missing")
            paths = [os.fsencode(path) for path in self._stack.paths]
            return LayerStack.open(paths, descriptors, keys, self._stack.devices)
        stack = LayerStack.open(options.lowerdir)
        for layer in stack.layers:
            self.keep(stacking.kept_name(layer.key), layer.descriptor)
        paths_now = [os.fsdecode(layer.path) for layer in stack.layers]
        self._stack = stacking.Stack([layer.key for layer in stack.layers], paths_now, [])
        self._wish = stacking.written(stacking.WISH, stacking.Wish([], False, stacking.DONE))
        self.keep("wish", self._wish)
        stacking.keep_stack(self._stack, self._keeping)
        return stack

    def refresh(self, union: Union, fuse: int) -> None:
        """Tell the kernel of other layers, where the daemon before this one could not."""
        if not self._stack.changed:
            return
        stacking.refresh(fuse, union, self.journal)
        self._stack = self._stack._replace(changed=False)
        stacking.keep_stack(self._stack, self._keeping)
        wish = stacking.read_wish(self._wish)
        if wish is not None:
            stacking.write(self._wish, wish._replace(answer=stacking.DONE))
