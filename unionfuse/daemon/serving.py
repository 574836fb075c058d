"""The main thread of a mount: waits for signals and for the end."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType

from unionfuse import mounting
from unionfuse.express.lane import Lane
from unionfuse.options import MountOptions
from unionfuse.pyfuse.channel import Channel
from unionfuse.union import Union

log = logging.getLogger("unionfuse")

_GRACE = 3.0  # seconds that open files may still be served after a signal asked for the end
_ENDED = 0  # in the pipe of events; other bytes are the numbers of signals
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (*_ENDS, signal.SIGUSR1)


class Server:
    """Waits beside the door that serves a mount, until it is unmounted or a signal ends it.

    SIGUSR1 logs a line; the others unmount, a second one without waiting for open files. Where
    the mount has a keeper, SIGHUP replaces this process by the installed version.
    """

    def __init__(
        self,
        door: Channel | Lane,
        union: Union,
        options: MountOptions,
        mount: mounting.Mount,
        make_room: Callable[[], None] | None = None,
        fall_asleep: Callable[[], None] | None = None,
    ) -> None:
        """
        Arguments:
            door: who serves; INIT has been answered.
            make_room: ends this process and has another take its place; called for SIGHUP.
            fall_asleep: ends this process until there is a request, if it can; called when there
                has been none for a while.
        """
        self._make_room = make_room
        self._fall_asleep = fall_asleep if options.sleep else None
        self._door = door
        self._union = union
        self._options = options
        self._mount = mount
        self._events = -1  # where events are written
        self._end_by: float | None = None  # when serving ends in any case, by time.monotonic

    def serve(self, ready: Callable[[], None]) -> int:
        """Wait for the end of the mount; 0 after a clean end, 1 after a failure of our own."""
        events, self._events = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in SIGNALS:
            signal.signal(number, _only_note)
        signal.set_wakeup_fd(self._events, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._door.when_ended(self._note_end)
        ready()
        self._wait(events)
        if self._door.failed:
            log.error("the mount on %s ends", self._shown)
            self._withdraw()
        self._door.close()
        if self._options.stats:
            log.info("unmounted: %s", self.status())
        return 1 if self._door.failed else 0

    def _note_end(self) -> None:
        os.write(self._events, bytes([_ENDED]))

    def status(self) -> str:
        """One line: what the union holds and what was asked of it."""
        nodes, handles = self._union.status()
        requests = Counter(self._door.counts())
        line = f"nodes={nodes} open={handles} requests={requests.total()}"
        if self._options.stats:
            line += f" python={self._door.handed()}"
            line += "".join(f" {name}={count}" for name, count in requests.most_common())
        return line

    @property
    def _shown(self) -> str:
        return os.fsdecode(self._mount.path)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(events, select.POLLIN)
        served = -1  # requests, when they were counted last
        while True:
            patience = None
            if self._end_by is not None:
                patience = max(0.0, self._end_by - time.monotonic()) * 1000
            elif self._fall_asleep is not None:
                patience = self._options.sleep / 2 * 1000  # it sleeps after one to two of these
            if not poll.poll(patience):
                if self._end_by is not None or self._fall_asleep is None:
                    return
                before, served = served, sum(self._door.counts().values())
                if served == before:
                    self._fall_asleep()
                continue
            for event in os.read(events, 64):
                if event == _ENDED or (event in _ENDS and self._end_by is not None):
                    return
                self._signalled(event)

    def _signalled(self, number: int) -> None:
        if number == signal.SIGUSR1:
            log.info("%s: %s", self._shown, self.status())
        elif number == signal.SIGHUP and self._make_room is not None:
            log.info("%s: the installed version takes over", self._shown)
            self._make_room()
        elif number in _ENDS:
            self._withdraw()  # and give those who have files open a moment to close them
            self._end_by = time.monotonic() + _GRACE

    def _withdraw(self) -> None:
        try:
            mounting.withdraw(self._mount)
        except mounting.MountError as error:
            log.warning("%s", error)


def _only_note(number: int, frame: FrameType | None) -> None:
    """The number of the signal is in the pipe (signal.set_wakeup_fd)."""
