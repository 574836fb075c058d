"""A copied-up file is whole after a power cut, wherever its name is there.

The cut is made by the file system itself (FS_IOC_SHUTDOWN without a flush of the log): what is not
on the device then is gone, and the next mount replays the journal.
"""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.disks import Disk
from harness.mounts import Daemon, unionfuse_command

from unionfuse.layers.ordering import keeps_order

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_WITHOUT_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
SIZES = {"small": 10_000, "page": 4096, "big": 9_000_000}
KINDS = ("ext4", "ext4 with fast commits", "ext4 without a journal", "xfs")


def cut_power(root: Path) -> None:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("=I", _WITHOUT_FLUSH))
    finally:
        os.close(descriptor)


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path, request.param)
    descriptor = os.open(made.root, os.O_RDONLY)
    assert keeps_order(descriptor) == (request.param != "ext4 without a journal")
    os.close(descriptor)
    yield made
    made.unmount()


def test_a_copy_up_is_whole_after_a_power_cut(disk: Disk, tmp_path: Path) -> None:
    lower, merged = tmp_path / "lower", tmp_path / "merged"
    content = {name: os.urandom(size) for name, size in SIZES.items()}
    for directory in (lower, merged, disk.root / "upper", disk.root / "work"):
        directory.mkdir()
    for name, data in content.items():
        (lower / name).write_bytes(data)
    os.sync()
    line = f"lowerdir={lower},upperdir={disk.root}/upper,workdir={disk.root}/work"
    daemon = Daemon.start(
        unionfuse_command("-f", "-o", line, merged), merged, tmp_path / "log", environment={}
    )
    try:
        for name in content:
            os.chmod(merged / name, 0o600)
        # Somebody else's fsync commits the journal: what was renamed until now is there for good.
        with open(disk.root / "other", "wb") as other:
            os.fsync(other.fileno())
        cut_power(disk.root)
    finally:
        subprocess.run(["umount", merged], check=True)
        daemon.wait()
    disk.unmount()
    disk.mount()
    for name, data in content.items():
        assert (disk.root / "upper" / name).read_bytes() == data
