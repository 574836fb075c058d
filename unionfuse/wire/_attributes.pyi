import os

PACKED_SIZE: int

class Attributes:
    ino: int
    size: int
    blocks: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    blksize: int
    mode: int
    nlink: int
    uid: int
    gid: int
    def __init__(self, status: os.stat_result, ino: int, nlink: int) -> None: ...
    def wire(self) -> bytes: ...
    def packed(self) -> bytes: ...
    @classmethod
    def unpacked(cls, packed: bytes) -> Attributes: ...
