"""pyfuse3 on trio, in a thread of its own.

Imported late, or never: trio and pyfuse3 take longer to import than a mount takes to be made, and
more memory than all the rest. With the express lane they are needed for what it does not know.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable

from unionfuse.options import MountOptions
from unionfuse.union import Union

log = logging.getLogger("unionfuse")


class EventLoop:
    """Serves a channel by pyfuse3; there can be one in a process.

    Attributes:
        requests: how many have been served, by name.
        failed: it ended by a failure of its own.
    """

    def __init__(
        self,
        descriptor: int,
        union: Union,
        options: MountOptions,
        started: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        """
        Arguments:
            descriptor: where requests come from; libfuse closes it.
            started: called when libfuse has shaken hands.
            ended: called, from the thread, when it serves no more.
        """
        self.requests: Counter[str] = Counter()
        self.failed = False
        self._descriptor = descriptor
        self._union = union
        self._options = options
        self._started = started
        self._ended = ended
        self._stop: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._live, name="pyfuse3", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it, whatever is still unanswered."""
        self._stop()
        self._thread.join(timeout=1)

    def _live(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._serve()
        except BaseException:
            log.exception("a failure inside")
            self.failed = True
        finally:
            self._ended()

    def _serve(self) -> None:
        import pyfuse3
        import trio

        from unionfuse.pyfuse.operations import Operations

        operations = Operations(self._union, self.requests, self._options.debug, self._started)
        pyfuse3.init(operations, f"/dev/fd/{self._descriptor}", set())

        async def serve() -> None:
            token = trio.lowlevel.current_trio_token()

            def stop() -> None:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(pyfuse3.terminate)

            self._stop = stop
            await pyfuse3.main()

        try:
            trio.run(serve)
        except* ConnectionAbortedError:
            pass  # an unmount while a request was being read; libfuse knows ENODEV alone
        finally:
            pyfuse3.close(unmount=False)
