"""Images and builds beside podman, docker and umoci: the same verbs, interleaved, on a Debian base.

    scripts/bench --images [--rounds N] [--only ROW]… [--json FILE]

Each tool has a store of its own below the cache; podman uses fuse-overlayfs, docker a private
daemon with overlay2 and no network, umoci an OCI layout. All take the same base, made by mmdebstrap
once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from benchmark.report import Results, Row

UMOCI_ROW = "commit one file"
BASE = "bench.test/debian:12"
_STARTED = time.time()

_DOCKERFILE = """\
FROM bench.test/debian:12
ENV A=b
COPY file /srv/file
RUN echo one > /srv/one
RUN cp /srv/one /srv/two && rm /srv/one
RUN mkdir /srv/three && mv /srv/two /srv/three
CMD ["sh"]
"""


class Tool:
    """A command line with docker's verbs.

    Attributes:
        command: what precedes the verb.
        build: options of a build; no network, since docker's daemon has none here.
        insecure: options of push and pull for a registry without TLS.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        build: Sequence[str] = (),
        insecure: Sequence[str] = (),
        **environment: str,
    ) -> None:
        self.name = name
        self.command = command
        self.build = build
        self.insecure = insecure
        self._environment = {**os.environ, **environment}

    def __call__(self, *words: str, stdin: Path | None = None) -> str:
        with open(stdin or os.devnull, "rb") as source:
            done = subprocess.run(
                [*self.command, *words],
                stdin=source,
                capture_output=True,
                text=True,
                env=self._environment,
            )
        if done.returncode:
            raise RuntimeError(f"{self.name} {' '.join(words)}: {done.stderr.strip()[-400:]}")
        return done.stdout


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the peers' daemons end too
    rows = [row for row in _WORKLOADS if not args.only or row[0] in args.only]
    cache = Path(args.cache).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    results = Results()
    with ExitStack() as stack:
        stack.callback(_tell, results, Path(args.json))  # also when it is ended early
        registry = stack.enter_context(_registry(cache))
        tools = [_unionfuse(cache), _podman(cache), stack.enter_context(_docker(cache))]
        base = _base(cache)
        for tool in tools:
            _prepare(tool, base)
        for number in range(args.rounds):
            for workload, prepare, work in rows:
                for tool in tools:
                    if (tool.name, workload) in _MISSING:
                        continue
                    scene = Scene(tool, cache, registry, number)
                    prepare(scene)
                    begun = time.perf_counter()
                    work(scene)
                    results.add(Row(1, False, workload), tool.name, time.perf_counter() - begun)
                    scene.tidy()
            if any(row[0] == UMOCI_ROW for row in rows):
                seconds = _umoci(cache, base, number)
                results.add(Row(1, False, UMOCI_ROW), "umoci", seconds)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    return 0


def _tell(results: Results, path: Path) -> None:
    print(_table(results))
    table = {
        str(row): {name: cell.samples for name, cell in peers.items()}
        for row, peers in results.cells.items()
    }
    path.write_text(json.dumps(table, indent=2))


def _table(results: Results) -> str:
    """Medians in milliseconds, as a table of Markdown."""
    names = list(dict.fromkeys(name for peers in results.cells.values() for name in peers))
    lines = ["| ms | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, peers in results.cells.items():
        medians = [f"{peers[name].median * 1000:.0f}" if name in peers else "–" for name in names]
        lines.append(f"| {row} | " + " | ".join(medians) + " |")
    return "\n".join(lines)


class Scene:
    """What one measurement has to do with."""

    def __init__(self, tool: Tool, cache: Path, registry: str, number: int) -> None:
        self.tool = tool
        self.number = number
        self.pushed = f"{registry}/{tool.name}/image:{number}"
        self.archive = cache / f"{tool.name}.tar"
        self.context = cache / "context"
        self.mounted: Path | None = None
        self._cache = cache

    def make_container(self) -> None:
        """A stopped container with one changed file."""
        tool = self.tool
        tool("create", "--network", "none", "--name", "bench", BASE, "true")
        changed = self._cache / "changed"
        changed.write_text(f"{time.time()}\n")
        tool("cp", str(changed), "bench:/etc/motd")

    def make_context(self) -> None:
        self.context.mkdir(exist_ok=True)
        (self.context / "Dockerfile").write_text(_DOCKERFILE)
        (self.context / "file").write_text(f"{_STARTED} {self.number}\n")  # new in each round

    def build(self) -> None:
        self.tool("build", *self.tool.build, "-t", "bench.test/built", str(self.context))

    def make_built(self) -> None:
        self.make_context()
        self.build()

    def make_archive(self) -> None:
        if not self.archive.exists():
            self.save()

    def make_pushed(self) -> None:
        """An image that is here and in the registry."""
        try:
            self.push()
        except RuntimeError:  # the row before was not asked for
            self.make_image()
            self.push()
            self.tool("rm", "-f", "bench")

    def make_pullable(self) -> None:
        """An image that is in the registry, and no longer here."""
        self.make_pushed()
        self.tool("rmi", "-f", self.pushed)

    def push(self) -> None:
        self.tool("push", *self.tool.insecure, self.pushed)

    def make_image(self) -> None:
        """An image to push that the registry has no layer of."""
        self.make_container()
        self.tool("commit", "bench", self.pushed)

    def make_loadable(self) -> None:
        """Remove every image, for those that were built on the base have its layers too."""
        self.make_archive()
        self.tool("image", "prune", "-a", "-f")

    def save(self) -> None:
        self.tool("save", "-o", str(self.archive), BASE)

    def load(self) -> None:
        self.tool("load", "-i", str(self.archive))

    def mount(self) -> None:
        if self.tool.name == "podman":
            self.mounted = Path(self.tool("image", "mount", BASE).strip())
        else:
            self.mounted = self._cache / "mnt"
            self.mounted.mkdir(exist_ok=True)
            self.tool("mount", BASE, str(self.mounted))

    def tidy(self) -> None:
        with suppress(RuntimeError):
            self.tool("rm", "-f", "bench")
        if self.mounted is not None and self.tool.name == "podman":
            self.tool("image", "umount", BASE)
        elif self.mounted is not None:
            self.tool("umount", str(self.mounted))


Step = Callable[[Scene], object]


def _commit(scene: Scene) -> None:
    scene.tool("commit", "bench", "bench.test/new")


def _pull(scene: Scene) -> None:
    scene.tool("pull", *scene.tool.insecure, scene.pushed)


_WORKLOADS: list[tuple[str, Step, Step]] = [
    (
        UMOCI_ROW,
        Scene.make_container,
        _commit,
    ),
    ("build, cold", Scene.make_context, Scene.build),
    ("build, cached", Scene.make_built, Scene.build),
    ("save", lambda s: s.archive.unlink(missing_ok=True), Scene.save),
    ("load", Scene.make_loadable, Scene.load),
    ("load again", Scene.make_archive, Scene.load),
    ("push", Scene.make_image, Scene.push),
    ("push again", Scene.make_pushed, Scene.push),
    ("pull", Scene.make_pullable, _pull),
    ("mount", lambda s: None, Scene.mount),
]
_MISSING = {("docker", "mount")}


def _prepare(tool: Tool, base: Path) -> None:
    with suppress(RuntimeError):
        tool("rm", "-f", "bench")
    if not tool("images", "-q", BASE).strip():
        tool("import", str(base), BASE)


def _unionfuse(cache: Path) -> Tool:
    command = [str(Path(sys.executable).with_name("unionfuse")), "--root", str(cache / "unionfuse")]
    return Tool("unionfuse", command, ["--network", "none"])


def _podman(cache: Path) -> Tool:
    folder = cache / "podman"
    command = ["podman", f"--root={folder}/root", f"--runroot={folder}/run"]
    command += ["--storage-driver=overlay", "--cgroup-manager=cgroupfs", "--events-backend=none"]
    command += ["--storage-opt=overlay.mount_program=/usr/bin/fuse-overlayfs", "--runtime=runc"]
    return Tool("podman", command, ["--network", "none"], ["--tls-verify=false"])


@contextmanager
def _docker(cache: Path) -> Iterator[Tool]:
    folder = cache / "docker"
    folder.mkdir(exist_ok=True)
    host = f"unix://{folder}/socket"
    words = ["/usr/sbin/dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/run"]
    words += ["--host", host, "--pidfile", f"{folder}/pid", "--bridge=none", "--iptables=false"]
    words += ["--storage-driver=overlay2", "--log-level=error"]
    daemon = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = ["--network", "none"]
    tool = Tool("docker", ["docker", "--host", host], options, DOCKER_BUILDKIT="0")
    try:
        for _ in range(300):
            with suppress(RuntimeError):
                tool("version")
                break
            time.sleep(0.1)
        yield tool
    finally:
        daemon.terminate()
        daemon.wait(60)


@contextmanager
def _registry(cache: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    folder = cache / "registry"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = folder / "config.json"
    storage = {"filesystem": {"rootdirectory": str(folder / "data")}}
    config.write_text(json.dumps({"version": 0.1, "storage": storage, "http": {"addr": host}}))
    server = subprocess.Popen(
        ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(host[10:])), 1):
                break
            time.sleep(0.05)
        yield host
    finally:
        server.terminate()
        server.wait(30)


def _base(cache: Path) -> Path:
    path = cache / "debian.tar"
    if not path.exists():
        staged = path.with_suffix(".part")
        subprocess.run(
            ["mmdebstrap", "--variant=minbase", "--format=tar", "bookworm", staged], check=True
        )
        staged.rename(path)
    return path


def _umoci(cache: Path, base: Path, number: int) -> float:
    """Its words for a commit of one file: insert, or unpack once and repack."""
    layout, bundle = cache / "umoci", cache / "umoci-bundle"
    if not layout.exists():
        run = subprocess.run
        run(["umoci", "init", "--layout", layout], check=True)
        run(["umoci", "new", "--image", f"{layout}:base"], check=True)
        root = cache / "umoci-root"
        root.mkdir()
        run(["tar", "-xf", base, "-C", root], check=True)
        run(["umoci", "insert", "--image", f"{layout}:base", root, "/"], check=True)
        shutil.rmtree(root)
    shutil.rmtree(bundle, ignore_errors=True)
    unpack: list[str | Path] = ["umoci", "unpack", "--image", f"{layout}:base", bundle]
    subprocess.run(unpack, check=True, capture_output=True)
    (bundle / "rootfs/etc/motd").write_text(f"{time.time()}\n")
    begun = time.perf_counter()
    subprocess.run(["umoci", "repack", "--image", f"{layout}:new{number}", bundle], check=True)
    return time.perf_counter() - begun


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench --images",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only",
        action="append",
        choices=[name for name, *_ in _WORKLOADS],
        help="only this row; may be given several times",
    )
    parser.add_argument("--cache", default=".cache/bench-images", help="where the stores are kept")
    parser.add_argument("--json", default="bench-images.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
