"""The mount program's command line, as __main__ has it. What is heavy is imported late."""

from __future__ import annotations

import sys

from unionfuse import __version__
from unionfuse.options import USAGE, UsageError, parse


def main(words: list[str] | None = None) -> int:
    """Mount as the words say; return 0 once the mount answers, 1 on failure, 2 on wrong usage."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    if {"-V", "--version"} & set(words):
        print(f"unionfuse {__version__}")
        return 0
    try:
        invocation = parse(words)
    except UsageError as error:
        print(f"unionfuse: {error}", file=sys.stderr)
        return 2
    from unionfuse.daemon import daemon

    return daemon.run(invocation)
