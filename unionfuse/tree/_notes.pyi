from typing_extensions import Buffer

FREE: int
BEGUN: int
FINISHED: int

_Subject = tuple[int, int, int]

class Notes:
    live: int
    def __init__(self, memory: Buffer, slot_size: int) -> None: ...
    def close(self) -> None: ...
    def use_half(self, end_word: int, start: int, limit: int, garbage: int, live: int) -> None: ...
    def append(
        self,
        kind: int,
        kind_of_file: int,
        number: int,
        lookups: int,
        inode: int,
        parent: int,
        payload: bytes,
        long_payload: bool = False,
    ) -> int: ...
    def replace(
        self,
        known: dict[int, int],
        kind: int,
        kind_of_file: int,
        number: int,
        lookups: int,
        inode: int,
        parent: int,
        payload: bytes,
    ) -> bool: ...
    def become(self, offset: int, kind: int) -> None: ...
    def kill(self, offset: int) -> None: ...
    def set_lookups(self, offset: int, lookups: int) -> None: ...
    def begin(
        self,
        offset: int,
        unique: int,
        opcode: int,
        node: int,
        body: bytes,
        one: _Subject,
        other: _Subject,
    ) -> None: ...
    def handle(self, offset: int, handle: int) -> None: ...
    def moving(self, offset: int, inode: int) -> None: ...
    def finish(self, offset: int, error: int, reply: bytes) -> None: ...
    def drop(self, offset: int) -> None: ...
    def state(self, offset: int) -> int: ...
    def request(self, offset: int) -> tuple[int, int, bytes, _Subject, _Subject, int, int]: ...
    def reply(self, offset: int) -> tuple[int, int, bytes]: ...
