"""Where things are that end with a boot, and which boot this is."""

from __future__ import annotations

import os
from pathlib import Path


def run_directory() -> Path:
    """What must not survive a reboot: /run/unionfuse as root, else below $XDG_RUNTIME_DIR."""
    named = os.environ.get("UNIONFUSE_RUNROOT")
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/run/unionfuse")
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/unionfuse-{os.geteuid()}"
    return Path(base, "unionfuse")


def boot_id() -> str:
    """Changes with every boot: processes and mounts recorded under another one are gone."""
    path = os.environ.get("UNIONFUSE_BOOT_ID", "/proc/sys/kernel/random/boot_id")
    return Path(path).read_text().strip()
