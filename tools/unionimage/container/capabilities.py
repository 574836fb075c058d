"""Linux capabilities: docker's default set, what --cap-add and --cap-drop make of it.

Nothing is asked for that this process lacks itself: the kernel would refuse it in the runtime, long
after the user could have been told.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from unionimage.errors import UserError

# Numbered from 0: linux/capability.h.
_KNOWN = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO
    SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME
    SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
    WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
_DEFAULT = """
    CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE
    SYS_CHROOT KILL AUDIT_WRITE
"""
NAMES = tuple(f"CAP_{name}" for name in _KNOWN.split())
DEFAULT = tuple(f"CAP_{name}" for name in _DEFAULT.split())


def available() -> frozenset[str]:
    """The bounding set of this process: no child can have more."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            mask = int(line.split()[1], 16)
            return frozenset(name for number, name in enumerate(NAMES) if mask >> number & 1)
    return frozenset()


def chosen(
    add: Iterable[str] = (), drop: Iterable[str] = (), *, privileged: bool = False
) -> list[str]:
    """The capabilities of a container, in the kernel's order.

    Raises UserError for an unknown name and for one that is named and cannot be given.
    """
    have = available()
    added, dropped = [_normal(name) for name in add], [_normal(name) for name in drop]
    if privileged:
        return [name for name in NAMES if name in have]
    wanted = set() if "ALL" in dropped else set(DEFAULT)
    if "ALL" in added:
        wanted = set(have)
    wanted -= set(dropped)
    for name in added:
        if name != "ALL":
            if name not in have:
                raise UserError(f"--cap-add {name}: this process does not have it itself")
            wanted.add(name)
    return [name for name in NAMES if name in wanted and name in have]


def _normal(name: str) -> str:
    upper = name.upper()
    if upper in ("ALL", "CAP_ALL"):
        return "ALL"
    full = upper if upper.startswith("CAP_") else f"CAP_{upper}"
    if full not in NAMES:
        raise UserError(f"unknown capability {name!r}: see capabilities(7)")
    return full
