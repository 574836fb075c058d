"""Any requests whatsoever, through both doors: each is answered, and nothing below is harmed."""

import tempfile
from pathlib import Path

import pytest
from harness.malformed import Door, clean
from harness.users import in_child
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from unionfuse.wire.protocol import Opcode

_WORDS = (b"a", b"b", b"d", b"e", b"new", b"..", b".", b"", b"x" * 256, b".wh.a", b"a/b", b"../d")
_ATTRIBUTES = (b"user.a", b"trusted.overlay.opaque", b"security.capability")
_OPCODES = (*map(int, Opcode), 0, 54, 63, 64, 4096, 0xFFFFFFFF)

names = st.lists(st.sampled_from(_WORDS + _ATTRIBUTES), max_size=3).map(
    lambda words: b"".join(word + b"\0" for word in words)
)
words = st.integers(0, 9) | st.integers(0, (1 << 64) - 1)
numbers = st.lists(words, max_size=11).map(
    lambda found: b"".join(number.to_bytes(8, "little") for number in found)
)
bodies = st.builds(bytes.__add__, numbers, names) | st.binary(max_size=200) | names
requests = st.tuples(st.sampled_from(_OPCODES), st.integers(0, 255), bodies)


def _run(directory: Path, kind: str) -> None:
    door = Door(directory, kind)

    @settings(
        max_examples=250, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(st.lists(requests, min_size=1, max_size=5))
    def ask(several: list[tuple[int, int, bytes]]) -> None:
        for opcode, node, body in several:
            door.ask(opcode, node, body)

    ask()
    door.check()


@pytest.mark.parametrize("kind", ["lane", "pyfuse3"])
def test_any_request_is_answered(kind: str) -> None:
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        in_child(_run, directory, kind)  # there can be one pyfuse3 in a process
    finally:
        clean(directory)
