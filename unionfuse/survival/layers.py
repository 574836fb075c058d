"""The layers of a running mount, seen and changed from outside (see stacking.py)."""

from __future__ import annotations

import os
import signal
import time

from unionfuse import mounting
from unionfuse.survival import stacking
from unionfuse.survival.upgrade import keeper_of

_PATIENCE = 60.0  # seconds


def layers(path: bytes) -> list[str]:
    """The directories of a mount's layers, topmost first. Raises MountError."""
    return _stack(path, keeper_of(path)[0]).paths


def change(path: bytes, wanted: list[str], force: bool = False) -> None:
    """Give a mount other layers, topmost first; programs that use it notice only what changes.

    Arguments:
        force: also when files of a layer that goes are open; these can be read until they are
            closed.

    Raises:
        MountError: no union, not ours, no keeper, or the daemon refuses: nothing has changed then.
    """
    keeper = keeper_of(path)[0]
    descriptor = _open(path, keeper, stacking.WISH)
    try:
        stacking.write(descriptor, stacking.Wish(wanted, force))
        os.kill(keeper, signal.SIGHUP)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            wish = stacking.read_wish(descriptor)
            if wish is not None and wish.answer == stacking.DONE:
                return
            if wish is not None and wish.answer:
                reason, _, remedy = wish.answer.rpartition("; ")
                raise mounting.MountError(path, reason or remedy, remedy)
            time.sleep(0.005)
    finally:
        os.close(descriptor)
    raise mounting.MountError(path, "its daemon does not answer", "see the mount's log")


def _stack(path: bytes, keeper: int) -> stacking.Stack:
    descriptor = _open(path, keeper, stacking.STACK)
    try:
        return stacking.read_stack(descriptor)
    finally:
        os.close(descriptor)


def _open(path: bytes, keeper: int, name: str) -> int:
    """A memory file that the keeper holds."""
    place = f"/proc/{keeper}/fd"
    try:
        for number in os.listdir(place):
            if os.readlink(f"{place}/{number}").startswith(f"/memfd:{name} "):
                return os.open(f"{place}/{number}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        raise mounting.MountError(path, "it is not yours", "run it as its owner") from None
    except OSError:
        pass  # it has just been replaced, or has ended
    raise mounting.MountError(path, "what its layers are is not known", "try it again")
