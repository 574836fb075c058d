"""File systems of a test's own, in a file that is mounted by loop."""

import subprocess
from pathlib import Path

MAKERS = {
    "ext4": ("mkfs.ext4", "-q"),
    "ext4 with fast commits": ("mkfs.ext4", "-q", "-O", "fast_commit"),
    "ext4 without a journal": ("mkfs.ext4", "-q", "-O", "^has_journal"),
    "ext4 with few inodes": ("mkfs.ext4", "-q", "-N", "80"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
}
_SMALLEST = 320  # MiB that XFS needs


class Disk:
    """One, mounted at `root`. Needs loop devices, and a kernel that has the file system."""

    def __init__(self, directory: Path, kind: str, mebibytes: int = _SMALLEST) -> None:
        self.image, self.root = directory / "image", directory / "disk"
        self.root.mkdir()
        with open(self.image, "wb") as image:
            image.truncate(mebibytes << 20)
        subprocess.run([*MAKERS[kind], self.image], check=True, stdout=subprocess.DEVNULL)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.root], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.root], capture_output=True, check=False)
