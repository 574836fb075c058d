"""For tests of `build`: a small root file system, a store, and what an image holds."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from unionimage.image_config import ImageConfig
from unionimage.store import Store

PROGRAM = str(Path(sys.executable).with_name("unionfuse"))
APPLETS = (
    "cat chmod chown cp cut date env find grep head id ln ls mkdir mktemp mount mv pwd rm rmdir"
)
APPLETS += " sed seq sh sha256sum sleep sort stat tail tar tee touch tr true umask wc wget readlink"


def make_root(path: Path) -> Path:
    """A root of busybox-static with the mount points and files that container engines expect."""
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"):
        (path / name).mkdir(parents=True)
    (path / "tmp").chmod(0o1777)
    shutil.copy2("/bin/busybox", path / "bin/busybox")
    for applet in APPLETS.split():
        (path / "bin" / applet).symlink_to("busybox")
    users = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"
    (path / "etc/passwd").write_text(users)
    (path / "etc/group").write_text("root:x:0:\ngrp:x:1001:\nother:x:2000:\n")
    for name in ("hosts", "hostname", "resolv.conf"):
        (path / "etc" / name).write_text("")
    return path


def write_files(directory: Path, files: Mapping[str, str]) -> None:
    """Write files; a name that ends with / is a directory, `-> x` a link, `#!` executable."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_text(content)
            path.chmod(0o755 if content.startswith("#!") else 0o644)


class Builder:
    """Runs `unionfuse build` on a store of its own that holds the image `base`."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "store"
        self.scratch = directory
        base = directory / "base"
        make_root(base / "root")
        (base / "Dockerfile").write_text('FROM scratch\nCOPY root/ /\nENV PATH=/bin\nCMD ["sh"]\n')
        self.build(base, "-t", "base")

    def run(
        self,
        *words: str | Path,
        check: bool = True,
        text: str | bytes = b"",
        env: Mapping[str, str] = {},
    ) -> subprocess.CompletedProcess[str]:
        """Run the program with these words; its output is captured."""
        done = subprocess.run(
            [PROGRAM, "--root", str(self.root), *map(str, words)],
            input=text.encode() if isinstance(text, str) else text,
            capture_output=True,
            env={**os.environ, **env},
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode != 0:
            raise AssertionError(f"unionfuse {words}: exit code {done.returncode}\n{err}")
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def build(self, context: str | Path, *words: str | Path, **options: object) -> str:
        """Build and return the image id."""
        done = self.run("build", "-q", *words, context, **options)
        assert done.stderr == "", done.stderr
        return done.stdout.strip()

    def failing(self, context: str | Path, *words: str | Path, **options: object) -> str:
        """Build what cannot be built; returns what was said on stderr."""
        done = self.run("build", *words, context, check=False, **options)
        assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
        return done.stderr

    def config(self, image: str) -> ImageConfig:
        with Store.open(self.root) as store:
            return store.image(image).config

    def tree(self, image: str) -> dict[str, str]:
        """Everything in an image, as `describe` tells it; kernel overlayfs merges the layers."""
        with Store.open(self.root) as store:
            layers = [str(path) for path in store.chain_directories(store.image(image).diff_ids)]
        empty, merged = self.scratch / "empty", self.scratch / "merged"
        empty.mkdir(exist_ok=True)
        merged.mkdir(exist_ok=True)
        lower = ":".join([*layers, str(empty)])
        mount = ["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={lower}", str(merged)]
        subprocess.run(mount, check=True)
        try:
            return describe(merged)
        finally:
            subprocess.run(["umount", str(merged)], check=True)

    def read(self, image: str, path: str) -> str:
        """The text of a file that the image's topmost layers hold."""
        with Store.open(self.root) as store:
            for layer in store.chain_directories(store.image(image).diff_ids):
                if (layer / path.lstrip("/")).is_file():
                    return (layer / path.lstrip("/")).read_text()
        raise AssertionError(f"{path} is not in {image}")


def describe(root: Path) -> dict[str, str]:
    """path -> kind, mode, owner and content of everything below a directory; no times."""
    found: dict[str, str] = {}
    for top, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(top, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            what = {stat.S_IFDIR: "directory", stat.S_IFLNK: "link", stat.S_IFREG: "file"}
            words = [what.get(kind, "special"), f"{status.st_mode & 0o7777:o}"]
            words.append(f"{status.st_uid}:{status.st_gid}")
            if kind == stat.S_IFLNK:
                words[1] = os.readlink(path)
            elif kind == stat.S_IFREG:
                words.append(hashlib.sha256(path.read_bytes()).hexdigest()[:12])
            found[str(path.relative_to(root))] = " ".join(words)
    return found


def context(path: Path, dockerfile: str, **files: str) -> Path:
    """A context with a Dockerfile on the image `base`; in names `__` stands for a dot."""
    path.mkdir(exist_ok=True)
    (path / "Dockerfile").write_text("FROM base\n" + dockerfile)
    write_files(path, {name.replace("__", "."): text for name, text in files.items()})
    return path


def added(builder: Builder, image: str) -> dict[str, str]:
    """What an image has that `base` has not, or has otherwise."""
    base = builder.tree("base")
    return {k: v for k, v in builder.tree(image).items() if base.get(k) != v}


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def made(builder: Builder, *words: str | Path) -> list[str]:
    """The steps that a build carried out, the others came from the cache."""
    lines = builder.run("build", "--progress", "plain", *words).stderr.splitlines()
    cached = {line.split()[0] for line in lines if line.endswith(" CACHED")}
    steps = [line for line in lines if line.split()[1:2] and line.split()[1].startswith("[")]
    return [line.partition("] ")[2] for line in steps if line.split()[0] not in cached]


def command_lines() -> list[bytes]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes())
        except OSError:
            continue
    return found
