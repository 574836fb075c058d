"""The event loop of a mount: pyfuse3 on trio, and signals.

Imported late: trio and pyfuse3 take longer to import than a mount takes to be made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable

import pyfuse3
import trio

from unionfuse import mounting
from unionfuse.channel import Channel
from unionfuse.express.lane import Lane
from unionfuse.operations import Operations
from unionfuse.options import MountOptions
from unionfuse.union import Union

log = logging.getLogger("unionfuse")

_GRACE = 3.0  # seconds that open files may still be served after a signal asked for the end


class Server:
    """Serves one mounted channel until it is unmounted or a signal ends it."""

    def __init__(
        self,
        channel: Channel | Lane,
        union: Union,
        options: MountOptions,
        mountpoint: bytes,
        make_room: Callable[[], None] | None = None,
    ) -> None:
        """
        Arguments:
            channel: where pyfuse3 gets its requests from; INIT has been answered.
            make_room: ends this process and has another take its place; called for SIGHUP.
        """
        self._make_room = make_room
        self._channel = channel
        self._union = union
        self._options = options
        self._mountpoint = mountpoint
        self._requests: Counter[str] = Counter()

    def serve(self, ready: Callable[[], None]) -> int:
        """Run until the mount has ended; 0 after a clean end, 1 after a failure of our own."""
        operations = Operations(
            self._union, trace=self._options.debug, started=self._channel.started
        )
        self._requests = operations.requests
        pyfuse3.init(operations, f"/dev/fd/{self._channel.descriptor}", set())
        try:
            trio.run(self._run, ready)
            code = 0
        except BaseException:
            log.exception("the mount on %s ends: a failure inside", self._shown)
            mounting.detach(self._mountpoint, lazy=True)
            code = 1
        finally:
            pyfuse3.close(unmount=False)
        self._channel.close()
        if self._options.stats:
            log.info("unmounted: %s", self.status())
        return code

    def status(self) -> str:
        """One line: what the union holds and what was asked of it."""
        nodes, handles = self._union.status()
        counts = self._channel.counts()
        requests = self._requests + Counter({name.upper(): n for name, n in counts.items()})
        line = f"nodes={nodes} open={handles} requests={requests.total()}"
        if self._options.stats:
            line += "".join(f" {name}={count}" for name, count in requests.most_common())
        return line

    @property
    def _shown(self) -> str:
        return os.fsdecode(self._mountpoint)

    async def _run(self, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._listen)
            ready()
            token = trio.lowlevel.current_trio_token()
            self._channel.when_ended(lambda: _soon(token, nursery.cancel_scope.cancel))
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

    async def _listen(self, task_status: trio.TaskStatus[None]) -> None:
        """SIGUSR1 logs a line; the others unmount, a second one without waiting for open files.

        Where the mount has a keeper, SIGHUP replaces this process by the installed version.
        """
        ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGUSR1, *ends) as signals:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, *ends))
                task_status.started()
                ending = False
                async for number in signals:
                    if number == signal.SIGUSR1:
                        log.info("%s: %s", self._shown, self.status())
                    elif number == signal.SIGHUP and self._make_room is not None:
                        log.info("%s: the installed version takes over", self._shown)
                        await trio.to_thread.run_sync(self._make_room)
                    elif ending:
                        pyfuse3.terminate()
                    else:
                        ending = True
                        nursery.start_soon(self._end)

    async def _end(self) -> None:
        """Take the mount away, and give those who have files open a moment to close them."""
        try:
            # In a thread: the kernel may write back mapped pages, which this loop has to serve.
            await trio.to_thread.run_sync(mounting.detach, self._mountpoint, True)
        except mounting.MountError as error:
            log.warning("%s", error)
        await trio.sleep(_GRACE)
        pyfuse3.terminate()


def _soon(token: trio.lowlevel.TrioToken, function: Callable[[], None]) -> None:
    """Have a function called in the event loop, from another thread."""
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(function)
