import os

NO_WAIT: int
DATA_SYNC: int
WRITE_BACK: int

def copy_plain(
    source: int,
    work: int,
    name: bytes,
    status: os.stat_result,
    marks: tuple[tuple[bytes, bytes], ...],
    settling: int,
) -> float: ...
