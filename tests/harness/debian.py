"""A real Debian tree to mount as a layer, kept between runs; scripts/quickstart makes it too."""

import fcntl
import os
import platform
import shutil
import subprocess
from pathlib import Path

_PROJECT = Path(__file__).parents[2]
_SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources")


def debian_root() -> Path:
    """Return the directory of a minimal Debian system; make it first if it is not there (20 s).

    It is only ever read: mount it as a lower layer.
    """
    layers = Path(os.environ.get("UNIONFUSE_CACHE", _PROJECT / ".cache")) / "layers"
    layers.mkdir(parents=True, exist_ok=True)
    with open(layers / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (layers / "base").is_dir():
            _make(layers / "base.new")
            os.rename(layers / "base.new", layers / "base")
    return layers / "base"


def _make(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o755)
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")
    sources = [name for name in _SOURCES if os.path.exists(name) and os.path.getsize(name)]
    options = ["--quiet", "--variant=minbase", "--skip=cleanup/tmp"]
    subprocess.run(
        ["mmdebstrap", *options, suite, directory, *sources], check=True, stdin=subprocess.DEVNULL
    )
    for name in os.listdir(directory / "tmp"):
        subprocess.run(["rm", "-rf", directory / "tmp" / name], check=True)
