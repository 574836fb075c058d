"""The event loop of a mount: pyfuse3 on trio, signals, and the log.

Imported late: trio and pyfuse3 take longer to import than a mount takes to be made.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import signal
import socket
import sys
import syslog
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import trio

from unionfuse import mounting
from unionfuse.express import protocol
from unionfuse.operations import Operations
from unionfuse.options import MountOptions
from unionfuse.union import Union

log = logging.getLogger("unionfuse")

_GRACE = 3.0  # seconds that open files may still be served after a signal asked for the end


class Server:
    """Serves one mounted channel until it is unmounted or a signal ends it."""

    def __init__(
        self, channel: int, init: bytes, union: Union, options: MountOptions, mountpoint: bytes
    ) -> None:
        """
        Arguments:
            channel: the mounted /dev/fuse, whose INIT has been answered.
            init: that INIT request, for libfuse to see.
        """
        self._channel = channel
        self._init = init
        self._union = union
        self._options = options
        self._mountpoint = mountpoint
        self._requests: Counter[str] = Counter()

    def serve(self, log_file: int | None, ready: Callable[[], None]) -> int:
        """Run until the mount has ended; 0 after a clean end, 1 after a failure of our own."""
        _log_to(log_file, self._options)
        operations = Operations(self._union)
        self._count_and_guard(operations)
        session = self._hand_over(operations)
        try:
            trio.run(self._run, ready)
            code = 0
        except BaseException:
            log.exception("the mount on %s ends: a failure inside", self._shown)
            mounting.detach(self._mountpoint, lazy=True)
            code = 1
        finally:
            pyfuse3.close(unmount=False)
        session.detach()  # libfuse has closed it
        os.close(self._channel)
        if self._options.stats:
            log.info("unmounted: %s", self.status())
        return code

    def status(self) -> str:
        """One line: what the union holds and what was asked of it."""
        nodes, handles = self._union.status()
        line = f"nodes={nodes} open={handles} requests={self._requests.total()}"
        if self._options.stats:
            line += "".join(f" {name}={count}" for name, count in self._requests.most_common())
        return line

    @property
    def _shown(self) -> str:
        return os.fsdecode(self._mountpoint)

    async def _run(self, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._listen)
            nursery.start_soon(self._call_when_served, ready)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()

    async def _call_when_served(self, ready: Callable[[], None]) -> None:
        try:
            ready()
        except BrokenPipeError:  # whoever asked for the mount did not wait for it
            await self._end()

    async def _listen(self, task_status: trio.TaskStatus[None]) -> None:
        """SIGUSR1 logs a line; the others unmount, a second one without waiting for open files."""
        ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGUSR1, *ends) as signals:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
                task_status.started()
                ending = False
                async for number in signals:
                    if number == signal.SIGUSR1:
                        log.info("%s: %s", self._shown, self.status())
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

    def _hand_over(self, operations: Operations) -> socket.socket:
        """Let libfuse take part in a conversation with the kernel that has begun without it.

        libfuse shakes hands over a socket, with a kernel that we play, so that it agrees to what
        we negotiated. In the middle of it, when it calls `init`, its end of the socket is
        replaced by the real channel; its answer goes to the kernel with a number that no request
        has, and is dropped there.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = theirs.fileno()

        def switch() -> None:
            os.dup2(self._channel, descriptor, inheritable=False)
            ours.close()

        operations.init = switch  # type: ignore[method-assign]
        fuse_options = {"debug"} if self._options.debug else set[str]()
        pyfuse3.init(operations, f"/dev/fd/{descriptor}", fuse_options)
        ours.send(protocol.init_for_libfuse(self._init))
        return theirs

    def _count_and_guard(self, operations: Operations) -> None:
        """Count every request; a bug in a handler fails that one request, not the mount."""
        for name, function in vars(pyfuse3.Operations).items():
            if inspect.iscoroutinefunction(function):
                handler = getattr(operations, name)
                setattr(operations, name, _counted(name, handler, self._requests))


def _counted(
    name: str, handler: Callable[..., Awaitable[Any]], requests: Counter[str]
) -> Callable[..., Awaitable[Any]]:
    async def serve(*arguments: Any) -> Any:
        requests[name] += 1
        try:
            return await handler(*arguments)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed", name)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return serve


class _Syslog(logging.Handler):
    _PRIORITIES = ((logging.ERROR, syslog.LOG_ERR), (logging.WARNING, syslog.LOG_WARNING))

    def emit(self, record: logging.LogRecord) -> None:
        reached = (number for level, number in self._PRIORITIES if record.levelno >= level)
        priority = next(reached, syslog.LOG_INFO)
        for line in self.format(record).splitlines():
            syslog.syslog(priority, line)


def _log_to(file: int | None, options: MountOptions) -> None:
    handler: logging.Handler
    if file is not None:
        handler = logging.StreamHandler(os.fdopen(file, "a", encoding="utf-8"))
    elif options.foreground:
        handler = logging.StreamHandler(sys.stderr)
    else:
        syslog.openlog("unionfuse", syslog.LOG_PID, syslog.LOG_DAEMON)
        handler = _Syslog()
    if not isinstance(handler, _Syslog):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
