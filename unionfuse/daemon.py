"""The life of one mount: check, mount, detach, serve, unmount."""

from __future__ import annotations

from unionfuse.options import Invocation


def run(invocation: Invocation) -> int:
    """Mount and serve; return the exit code of the command."""
    raise NotImplementedError
