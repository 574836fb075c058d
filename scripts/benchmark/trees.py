"""The layers that every file system mounts, made once and kept in .cache/bench.

A tree of `files` small files in directories of a hundred, spread over the layers so that every
layer has every directory: the work that a union has to do. The lowest layer also holds one big
file, and a source tree in a git repository.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

_DIRECTORY = 100  # files in a directory
_PACKAGES = ("less", "tree", "ncurses-term", "manpages")
_CHUNK = os.urandom(1 << 20)


@dataclass(frozen=True)
class Tree:
    """Layer directories named 0 (the top) … n-1 in `root`, and what one finds in their union."""

    root: Path
    layers: int
    files: int
    big: int  # bytes of the file `big`

    @property
    def lowers(self) -> list[Path]:
        return [self.root / str(number) for number in range(self.layers)]

    @property
    def flat(self) -> Path:
        """The same tree as one plain directory: what the disk's own file system does with it."""
        return self.root / "flat"

    @property
    def hits(self) -> Path:
        """A list of all files, in random order."""
        return self.root / "hits"

    @property
    def misses(self) -> Path:
        """As many names that are not there, in the same directories."""
        return self.root / "misses"


def make(cache: Path, layers: int, files: int, big: int) -> Tree:
    """Make a tree, or take the one that was made before."""
    tree = Tree(cache / f"{layers}x{files}", layers, files, big)
    done = tree.root / f"done-{big}"
    if not done.exists():
        shutil.rmtree(tree.root, ignore_errors=True)
        print(f"making {files} files in {layers} layers", flush=True)
        _fill(tree)
        done.touch()
    return tree


def debian(cache: Path, layers: int) -> Tree:
    """A minimal Debian as the lowest of several layers that hold nothing else."""
    tree = Tree(cache / f"debian-{layers}", layers, 0, 0)
    if not tree.root.exists():
        base = cache / "debian"
        if not base.exists():
            print("making a Debian system", flush=True)
            shutil.rmtree(base.with_suffix(".new"), ignore_errors=True)
            words = ["mmdebstrap", "--quiet", "--variant=minbase", "bookworm"]
            subprocess.run([*words, base.with_suffix(".new")], check=True, stdin=subprocess.DEVNULL)
            base.with_suffix(".new").rename(base)
        staged = tree.root.with_suffix(".new")
        shutil.rmtree(staged, ignore_errors=True)
        for number in range(layers - 1):
            (staged / str(number)).mkdir(parents=True)
        staged.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", base, staged / str(layers - 1)], check=True)
        staged.rename(tree.root)
    return tree


def packages(cache: Path) -> list[Path]:
    """Debian packages to be installed: downloaded once."""
    folder = cache / "archives"
    if not folder.exists():
        staged = folder.with_suffix(".new")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        words = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *_PACKAGES]
        subprocess.run(words, cwd=staged, check=True)
        staged.rename(folder)
    return sorted(folder.glob("*.deb"))


def protect(tree: Tree) -> None:
    """Have the kernel refuse every change of the layers, in this mount namespace.

    Not every peer leaves read-only branches alone: mergerfs deletes the target of a rename there.
    """
    subprocess.run(["mount", "--bind", tree.root, tree.root], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", tree.root], check=True)


def source_archive(cache: Path) -> Path:
    """A tar of a source tree that every machine has: Python's own library."""
    archive = cache / "source.tar"
    if not archive.exists():
        library = Path(sysconfig.get_path("stdlib"))
        with tarfile.open(archive.with_suffix(".new"), "w") as tar:
            tar.add(library, "source", filter=_only_sources)
        archive.with_suffix(".new").rename(archive)
    return archive


def many_files(cache: Path, count: int) -> Path:
    """One layer of `count` empty files, for the time that a mount takes."""
    layer = cache / f"many-{count}"
    done = cache / f"many-{count}.done"
    if not done.exists():
        shutil.rmtree(layer, ignore_errors=True)
        print(f"making a layer of {count} files", flush=True)
        for number in range(count):
            directory = layer / f"d{number // 10_000}" / f"e{number // 100 % 100}"
            if number % 100 == 0:
                directory.mkdir(parents=True, exist_ok=True)
            os.close(os.open(directory / f"f{number}", os.O_CREAT | os.O_WRONLY, 0o644))
        done.touch()
    return layer


def _only_sources(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    skipped = ("site-packages", "__pycache__", "test", "config-")
    return None if any(part in member.name for part in skipped) else member


def _fill(tree: Tree) -> None:
    names = [f"d{i // _DIRECTORY:04}/f{i:06}" for i in range(tree.files)]
    directories = sorted({name.partition("/")[0] for name in names})
    for layer in tree.lowers:
        layer.mkdir(parents=True)
        for directory in directories:
            (layer / directory).mkdir()
    tree.flat.mkdir()
    for directory in directories:
        (tree.flat / directory).mkdir()
    for number, name in enumerate(names):
        content = _CHUNK[number % 1000 : number % 1000 + 512 + number * 37 % 3500]
        for top in (tree.lowers[number % tree.layers], tree.flat):
            (top / name).write_bytes(content)
    for top in (tree.lowers[-1], tree.flat):
        with open(top / "big", "wb") as file:
            for _ in range(tree.big >> 20):
                file.write(_CHUNK)
        _repository(top / "repository", source_archive(tree.root.parent))
    order = random.Random(1)
    order.shuffle(names)
    tree.hits.write_bytes(b"".join(name.encode() + b"\0" for name in names))
    tree.misses.write_bytes(b"".join(name.encode() + b".missing\0" for name in names))


def _repository(path: Path, archive: Path) -> None:
    path.mkdir()
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", "-C", str(path)]
    subprocess.run(["tar", "-xf", archive, "-C", path], check=True)
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "source"], check=True)
