"""What kernel overlayfs renamed inside of what it had renamed: redirects below redirects."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unionfuse import syscalls
from unionfuse.index.builder import build
from unionfuse.layers.layer import LayerStack

WANTED = {"d2/f2": "f", "d2/sub2/f": "s", "d2/sub2/g": "g"}


@pytest.mark.parametrize("how", ["lower", "upper", "index"])
def test_redirects_below_redirects(scratch: Path, how: str) -> None:
    """A relative redirect names a sibling in what its parent stands for below."""
    top = scratch / f"nested-{how}"
    for name in ("lower/d/sub", "upper", "work", "work2", "merged", "mnt"):
        (top / name).mkdir(parents=True)
    for path, text in (("d/f", "f"), ("d/sub/f", "s"), ("d/sub/g", "g")):
        (top / "lower" / path).write_text(text)
    lower, upper, merged = top / "lower", top / "upper", top / "merged"
    words = f"lowerdir={lower},upperdir={upper},workdir={top}/work,redirect_dir=on,metacopy=on"
    syscalls.mount(b"overlay", os.fsencode(merged), b"overlay", 0, words.encode())
    try:
        (merged / "d/f").chmod(0o600)
        (merged / "d/sub/f").chmod(0o600)
        (merged / "d").rename(merged / "d2")
        (merged / "d2/sub").rename(merged / "d2/sub2")
        (merged / "d2/f").rename(merged / "d2/f2")
    finally:
        syscalls.umount(os.fsencode(merged))
    options = f"lowerdir={upper}:{lower}"
    if how == "upper":
        options = f"lowerdir={lower},upperdir={upper},workdir={top}/work2"
        options += ",redirect_dir=on,metacopy=on"
    elif how == "index":
        stack = LayerStack.open([os.fsencode(upper), os.fsencode(lower)])
        build(stack.layers).write(os.fsencode(top / "index"))
        stack.close()
        options += f",lookup_index={top}/index"
    command = [sys.executable, "-m", "unionfuse", "-o", options, str(top / "mnt")]
    subprocess.run(command, check=True)
    try:
        files = [path for path in (top / "mnt").rglob("*") if path.is_file()]
        assert {str(p.relative_to(top / "mnt")): p.read_text() for p in files} == WANTED
    finally:
        syscalls.umount(os.fsencode(top / "mnt"))
        shutil.rmtree(top, ignore_errors=True)
