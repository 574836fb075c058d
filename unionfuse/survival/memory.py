"""The memory that daemons of one mount share, one after the other: a memfd that the keeper holds.

A process that is killed leaves every store that it has executed, in order. So whatever is written
here is written first and made to count last, by one store of 8 bytes. Nothing is ever on disk: the
memory ends with the mount.

    0        words of 8 bytes, see Word
    1024     the kernel's INIT request, and the answer that it got
    4096     the intent log: SLOTS slots of SLOT bytes (intents.py)
    1016 KiB the mount point, and 6 KiB behind it its device, each with its length in front
    1 MiB    the journal, first half (journal.py); the file is sparse
    …        the journal, second half
"""

from __future__ import annotations

import enum
import mmap
import os
import sys

from unionfuse import syscalls
from unionfuse.tree._notes import Notes
from unionfuse.tree.journal import FIRST_FRESH_ID

SLOT = 4096
SLOTS = 192
SLOTS_AT = 4096
JOURNAL_AT = 1 << 20
HALF = 512 << 20  # bytes of journal, some millions of nodes; only what is written takes memory
_SIZE = JOURNAL_AT + 2 * HALF
_INIT_AT = 1024
_MOUNTPOINT_AT = JOURNAL_AT - 8192
_DEVICE_AT = JOURNAL_AT - 2048
_MAGIC = 0x0001_4B45_4550_0003  # its last digits count versions of this layout


class Word(enum.IntEnum):
    """Words of 8 bytes at the beginning."""

    MAGIC = 0
    HALF = 1  # which half of the journal counts: 0 or 1
    END = 2  # of what is written in half 0, and after it of half 1; offsets in the file
    FRESH_ID = 4  # the next node id that is made up
    HANDLE = 5  # the next handle
    GENERATION = 6  # how many daemons there were
    FULL = 7  # not 0: something did not fit, so no other daemon can take over
    BACKING = 8  # the backing id that the kernel gave last; it counts upwards
    CLOSING = 9  # the backing id that was given back last, or is just being given back
    CLOSING_YOUNG = 10  # the same, of a young file (express/_young.pyx)


class TakeOverError(Exception):
    """The shared memory cannot be gone on with: written by another version, or full."""


class SharedMemory:
    """The mapped memfd.

    Attributes:
        bytes, words: the same memory, byte by byte and in words of 8 bytes.
        notes: writes to it what each change needs.
        descriptor: the memfd.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, _SIZE)
        self.bytes = memoryview(self._map)
        self.words = self.bytes.cast("Q")
        self.notes = Notes(self.bytes, SLOT)

    @classmethod
    def create(cls) -> SharedMemory:
        """A new one. Raises OSError where the kernel has no memory to promise."""
        descriptor = os.memfd_create("unionfuse", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, _SIZE)
            memory = cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        memory.words[Word.END] = JOURNAL_AT
        memory.words[Word.END + 1] = JOURNAL_AT + HALF
        memory.words[Word.FRESH_ID] = FIRST_FRESH_ID
        memory.words[Word.HANDLE] = 1
        memory.words[Word.GENERATION] = 1
        memory.words[Word.MAGIC] = _MAGIC
        return memory

    @classmethod
    def take_over(cls, descriptor: int) -> SharedMemory:
        """The one that the daemon before this one wrote. Raises TakeOverError."""
        if os.fstat(descriptor).st_size != _SIZE:
            raise TakeOverError("it was written by another version")
        memory = cls(descriptor)
        if memory.words[Word.MAGIC] != _MAGIC:
            raise TakeOverError("it was written by another version")
        if memory.words[Word.FULL]:
            raise TakeOverError("it was full")
        memory.words[Word.GENERATION] += 1
        return memory

    @property
    def generation(self) -> int:
        return self.words[Word.GENERATION]

    def keep_init(self, request: bytes, flags: int) -> None:
        """Note the kernel's INIT and the flags that were granted: it is not sent again."""
        self.bytes[_INIT_AT + 16 : _INIT_AT + 16 + len(request)] = request
        self.words[_INIT_AT // 8 + 1] = flags
        self.words[_INIT_AT // 8] = len(request)

    def init(self) -> tuple[bytes, int]:
        """What `keep_init` noted; an empty request where it never came to that."""
        length, flags = self.words[_INIT_AT // 8], self.words[_INIT_AT // 8 + 1]
        return bytes(self.bytes[_INIT_AT + 16 : _INIT_AT + 16 + length]), flags

    @staticmethod
    def mountpoint_in(descriptor: int) -> bytes:
        """The mount point that is noted in a memory of any mount."""
        head = os.pread(descriptor, 8192, _MOUNTPOINT_AT)
        return head[8 : 8 + int.from_bytes(head[:8], sys.byteorder)]

    @property
    def mountpoint(self) -> bytes:
        """Where it is mounted: the absolute path; empty until then."""
        return self._text(_MOUNTPOINT_AT)

    @mountpoint.setter
    def mountpoint(self, path: bytes) -> None:
        self._note_text(_MOUNTPOINT_AT, path)

    @property
    def device(self) -> bytes:
        """The mount's, as /proc/self/mountinfo has it; empty where it is not known."""
        return self._text(_DEVICE_AT)

    @device.setter
    def device(self, device: bytes) -> None:
        self._note_text(_DEVICE_AT, device)

    def _text(self, at: int) -> bytes:
        return bytes(self.bytes[at + 8 : at + 8 + self.words[at // 8]])

    def _note_text(self, at: int, text: bytes) -> None:
        self.bytes[at + 8 : at + 8 + len(text)] = text
        self.words[at // 8] = len(text)

    def give_back(self, offset: int, length: int) -> None:
        """Let go of pages that are not needed any more; they read as zeros afterwards."""
        if length:
            syscalls.fallocate(self.descriptor, 0x3, offset, length)  # PUNCH_HOLE, KEEP_SIZE

    def close(self) -> None:
        self.notes.close()
        self.words.release()
        self.bytes.release()
        self._map.close()
        os.close(self.descriptor)
