"""Which file systems keep the order of a file's data and a later rename of it, through a power cut.

A copy is staged, and one rename makes it visible; the rename must not outlive a power cut that the
data does not. fsync before the rename makes sure of it everywhere, and waits for a commit of the
journal, which costs some hundred times what the copy of a small file does. Where the file system
has a journal it is enough that the data has been written and waited for:

- ext4 allocates the blocks and logs size and extents when it writes the data back, and ends a
  page's writeback only when the extents have been turned from unwritten to written in the journal
  (fs/ext4/page-io.c, ext4_end_io_end). The rename is logged later, so in the same transaction or a
  later one; transactions are replayed whole and in order. A commit flushes the device's cache
  before it is written (fs/jbd2/commit.c). A fast commit writes the inodes before the names
  (fs/ext4/fast_commit.c, ext4_fc_perform_commit). Only with a journal, and one on the same
  device, whose cache is then the one that is flushed.
- XFS logs extents and size before it ends the writeback (fs/xfs/xfs_aops.c, xfs_end_ioend), the log
  is strictly ordered, and each checkpoint flushes the data device first (fs/xfs/xfs_log_cil.c,
  xlog_cil_push_work). Not where the log or real-time data is on another device.
"""

from __future__ import annotations

import os


def keeps_order(descriptor: int) -> bool:
    """Whether written data survives wherever a rename after it does, for files beside this one.

    False where that is not known, as without /proc or /sys.
    """
    device = os.stat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        kind, options = _mounted(number)
        if kind == "ext4":
            block = os.path.basename(os.readlink(f"/sys/dev/block/{number}"))
            return os.path.isdir(f"/proc/fs/jbd2/{block}-8")  # inode 8: a journal of its own
    except OSError:
        return False
    return kind == "xfs" and not any(o.startswith(("logdev=", "rtdev=")) for o in options)


def _mounted(number: str) -> tuple[str, list[str]]:
    """Kind and options of the file system on a device, MAJOR:MINOR; ("", []) for none."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                kind, _, options = after.split()[:3]
                return kind, options.split(",")
    return "", []
