"""The command `unionfuse` without a process of its own."""

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout

from unionimage.cli import main

from harness.command import Command


class Inside(Command):
    """Runs the command in this process: much faster than starting Python for each."""

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["--root", str(self.root), *words])
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
