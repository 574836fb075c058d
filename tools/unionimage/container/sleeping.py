"""A monitor's sleep: while nothing happens it is a small program in C, not an interpreter.

`sleep` executes that program (waiter.c) in the monitor's own place: process id, children,
descriptors and the lock that says it lives stay as they are. When output, a client or a signal
comes it executes this module, which makes the monitor anew from what was noted and goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unionimage.container.runtime import Runtime

AFTER = 60.0  # seconds without anything to do
# They wait, blocked, from before the sleep until the monitor has its handlers again.
SIGNALS = (signal.SIGCHLD, signal.SIGTERM)
PROGRAM = str(Path(__file__).with_name("unionfuse-waiter"))


def after() -> float | None:
    """Seconds after which a monitor sleeps; None: never."""
    named = os.environ.get("UNIONFUSE_SLEEP_AFTER")
    seconds = AFTER if named is None else float(named)
    return seconds if seconds > 0 and os.access(PROGRAM, os.X_OK) else None


def sleep(note: dict[str, Any], watched: Iterable[int], others: Iterable[int]) -> None:
    """Become the program that waits; never returns.

    Args:
        note: what `wake` gets; plain values.
        watched: descriptors that wake it when they can be read.
        others: descriptors that are to stay open as well.
    """
    memory = os.memfd_create("monitor", 0)
    os.write(memory, json.dumps(note).encode())
    watched = list(watched)
    for descriptor in (*watched, *others):
        os.set_inheritable(descriptor, True)
    numbers = ",".join(map(str, watched))
    command = [sys.executable, "-P", "-m", __name__, str(memory)]
    os.execv(PROGRAM, [PROGRAM, numbers, *command])


def wake(memory: int) -> None:
    """The monitor again; returns when its container has ended for good."""
    from unionimage.container import monitor, runtime, starting
    from unionimage.container.inventory import Inventory
    from unionimage.store import Store

    Path("/proc/self/comm").write_text("unionfuse")
    note = json.loads(os.pread(memory, os.fstat(memory).st_size, 0))
    os.close(memory)
    root = Path(note["root"])
    inventory = Inventory(root, lambda: Store.open(root))
    container = inventory.containers.find(note["container"])
    chosen: Runtime = runtime.Runtime(*note["runtime"])
    hooks = starting.hooks(inventory, container, note["network"])
    monitor.Monitor(container, chosen, hooks, None, -1).go_on(note)


if __name__ == "__main__":
    code = 1
    try:
        wake(int(sys.argv[1]))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
