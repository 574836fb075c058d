"""What a thread that asks may do."""

import os

FSETID = 1 << 4
SYS_ADMIN = 1 << 21
"""Bits of a set of capabilities (linux/capability.h)."""


def has_capability(pid: int, capability: int) -> bool:
    """Whether a thread has a capability in our user namespace; False where that cannot be seen."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            effective = next(line for line in status if line.startswith(b"CapEff:"))
        theirs, ours = os.stat(f"/proc/{pid}/ns/user"), os.stat("/proc/self/ns/user")
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) & capability) and os.path.samestat(theirs, ours)
