"""Where things are that end with a boot, and which boot this is."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # see unionfuse.daemon.errand
if TYPE_CHECKING:
    from pathlib import Path


def run_path() -> str:
    """What must not survive a reboot: /run/unionfuse as root, else below $XDG_RUNTIME_DIR."""
    if named := os.environ.get("UNIONFUSE_RUNROOT"):
        return named
    if os.geteuid() == 0:
        return "/run/unionfuse"
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/unionfuse-{os.geteuid()}"
    return f"{base}/unionfuse"


def run_directory() -> Path:
    """The same as a Path."""
    from pathlib import Path

    return Path(run_path())


def boot_id() -> str:
    """Changes with every boot: processes and mounts recorded under another one are gone."""
    from pathlib import Path

    path = os.environ.get("UNIONFUSE_BOOT_ID", "/proc/sys/kernel/random/boot_id")
    return Path(path).read_text().strip()
