"""The command `unionfuse`: one file per verb, dispatched here.

Only the module of the verb that was asked for is imported: start-up time is a feature.
"""

from __future__ import annotations

import sys

# verb -> (module below this package, one line of help). A module has `configure(parser)`, which adds
# its arguments to an argparse parser, and `run(args) -> int`, which returns the exit code.
VERBS: dict[str, tuple[str, str]] = {}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    A call in the manner of mount(8) (an `-o` list with `lowerdir=`) is handed to the file system.
    """
    words = sys.argv[1:] if argv is None else argv
    if _is_mount_call(words):
        from unionfuse.__main__ import main as mount_program

        return mount_program(words)
    print(f"unionfuse: unknown command {' '.join(words[:1])!r}", file=sys.stderr)
    return 2


def _is_mount_call(words: list[str]) -> bool:
    for position, word in enumerate(words):
        if word == "-o" and "lowerdir=" in "".join(words[position + 1 : position + 2]):
            return True
        if word.startswith("-o") and "lowerdir=" in word:
            return True
    return words == ["--version"] or words == ["-V"]
