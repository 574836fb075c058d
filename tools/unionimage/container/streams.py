"""The streams of a container's process, as its monitor holds them: pipes or a terminal.

One object for each start. Output is handed on as it comes; input waits here until the process
takes it. Everything happens in the monitor's loop: what is registered with the selector is a
function that takes the events.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any

CHUNK = 1 << 16


class Streams:
    """See the module.

    Args:
        console: where the runtime sends a terminal to; None: pipes.
        wants_input: the process gets a pipe to read from, or nothing.
        received: called with `stdout` or `stderr` and what came.
        ended: called when an output is at its end.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        console: str | None,
        wants_input: bool,
        received: Callable[[str, bytes], None],
        ended: Callable[[], None],
    ) -> None:
        self._selector, self._received, self._ended = selector, received, ended
        self._outputs: dict[int, str] = {}  # descriptor -> stdout, stderr
        self._stdin = self._master = -1
        self._input = bytearray()
        self._input_ends = False
        self._listener: socket.socket | None = None
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.theirs = [null, null, null]  # what the process gets as its descriptors 0, 1 and 2
        self._ours: list[int] = []
        if console is not None:
            self._listener = _listen(console)
            return
        for number in (1, 2):
            reader, self.theirs[number] = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(reader, False)
            self._ours.append(reader)
        if wants_input:
            os.close(null)
            self.theirs[0], self._stdin = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._stdin, False)

    @classmethod
    def noted(
        cls,
        selector: selectors.BaseSelector,
        note: dict[str, Any],
        received: Callable[[str, bytes], None],
        ended: Callable[[], None],
    ) -> Streams:
        """Those of another process, which has made this `note` of them."""
        new = cls.__new__(cls)
        new._selector, new._received, new._ended = selector, received, ended
        new._outputs, new._input, new._input_ends = {}, bytearray(), False
        new._listener, new.theirs, new._ours = None, [], []
        new._stdin, new._master = note["stdin"], note["master"]
        for descriptor, name in note["outputs"]:
            new._watch(descriptor, name)
        for descriptor in (*new.outputs, *new.inputs):
            os.set_inheritable(descriptor, False)
        return new

    def note(self) -> dict[str, Any]:
        """Plain values for `noted`."""
        outputs = list(self._outputs.items())
        return {"outputs": outputs, "stdin": self._stdin, "master": self._master}

    @property
    def outputs(self) -> list[int]:
        """The descriptors that are read."""
        return list(self._outputs)

    @property
    def inputs(self) -> list[int]:
        """Those that are only written to."""
        return [self._stdin] if self._stdin >= 0 and self._stdin not in self._outputs else []

    @property
    def busy(self) -> bool:
        """Whether there is input that the process has not taken yet."""
        return bool(self._input)

    def let_go(self) -> None:
        """Close the ends that are the process's alone."""
        for descriptor in set(self.theirs):
            os.close(descriptor)

    def abandon(self) -> None:
        """Close everything of a process that did not start."""
        for descriptor in (*self._ours, self._stdin):
            if descriptor >= 0:
                os.close(descriptor)
        self._stdin = -1
        if self._listener is not None:
            self._listener.close()

    def started(self) -> None:
        """Begin to read; with a console, take the terminal that the runtime made."""
        if self._listener is None:
            for descriptor, name in zip(self._ours, ("stdout", "stderr"), strict=True):
                self._watch(descriptor, name)
            return
        with self._listener:
            connection, _ = self._listener.accept()
            with connection:
                _, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
        self._master = self._stdin = descriptors[0]
        os.set_blocking(self._master, False)
        self._watch(self._master, "stdout")

    @property
    def open(self) -> bool:
        """Whether there may be more output."""
        return bool(self._outputs)

    # ---- output

    def _watch(self, descriptor: int, name: str) -> None:
        self._outputs[descriptor] = name
        self._want(descriptor, reading=True)

    def hold(self, waiting: bool) -> None:
        """Read on, or let the process wait for those who read too slowly."""
        for descriptor in list(self._outputs):
            self._want(descriptor, reading=not waiting)

    def _want(self, descriptor: int, *, reading: bool) -> None:
        """Read from a stream or leave it, without forgetting input that waits for a terminal."""
        events = selectors.EVENT_READ if reading else 0
        if descriptor == self._stdin and self._input:
            events |= selectors.EVENT_WRITE
        known = self._selector.get_map().get(descriptor)
        if known is None and events:
            self._selector.register(descriptor, events, lambda mask: self._serve(descriptor, mask))
        elif known is not None and not events:
            self._selector.unregister(descriptor)
        elif known is not None and known.events != events:
            self._selector.modify(descriptor, events, known.data)

    def _serve(self, descriptor: int, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._feed()
        if mask & selectors.EVENT_READ and descriptor in self._outputs:
            self._read(descriptor)

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody holds the terminal any more
            data = b""
        if data:
            self._received(self._outputs[descriptor], data)
        else:
            self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        del self._outputs[descriptor]
        with contextlib.suppress(KeyError):
            self._selector.unregister(descriptor)
        if descriptor == self._master:
            self._master = self._stdin = -1
        os.close(descriptor)
        self._ended()

    def end_output(self) -> None:
        """Read no more, whoever still holds an output open."""
        for descriptor in list(self._outputs):
            self._end(descriptor)

    # ---- input

    def write(self, data: bytes) -> None:
        """Input for the process; what it does not take now it gets later."""
        if self._stdin >= 0:
            self._input += data
            self._feed()

    def end_input(self) -> None:
        """There is no more input: pass the end on, once what came is written."""
        if self._stdin >= 0 and self._stdin != self._master:
            self._input_ends = True
            self._feed()

    def _feed(self) -> None:
        if self._stdin < 0:
            return
        try:
            while self._input:
                written = os.write(self._stdin, self._input[:CHUNK])
                del self._input[:written]
        except BlockingIOError:
            pass
        except OSError:  # EPIPE: the process reads no more
            self._input.clear()
            self._input_ends = True
        if self._stdin == self._master:
            return  # `hold` registers a terminal for both directions
        self._want(self._stdin, reading=False)
        if self._input_ends and not self._input:
            self.close_input()

    def close_input(self) -> None:
        """Forget what the process did not take."""
        if self._stdin >= 0:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._stdin)
            os.close(self._stdin)
        self._stdin = -1
        self._input.clear()

    def resize(self, rows: int, columns: int) -> None:
        """The terminal's size, where there is one."""
        if self._master >= 0:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)


def _listen(console: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(console)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(console)
    listener.listen(1)
    return listener
