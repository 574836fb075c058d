"""The command `unionfuse` as users run it, with a store and docker configuration of its own."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from unionimage.image_config import ImageConfig
from unionimage.reference import Reference
from unionimage.spec import Platform
from unionimage.store import Store

MAIN = "import sys; from unionimage.cli import main; sys.exit(main())"


@dataclass
class Command:
    """The command `unionfuse` with a store and docker configuration of its own."""

    root: Path
    environment: dict[str, str]

    def __call__(self, *words: str, stdin: str = "", code: int = 0) -> str:
        done = self.run(*words, stdin=stdin)
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*words),
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
        )

    def line(self, *words: str) -> list[str]:
        return [sys.executable, "-c", MAIN, "--root", str(self.root), *words]

    def store(self) -> Store:
        return Store.open(self.root)

    def tag(self, name: str, *names: str) -> None:
        with self.store() as store:
            for one in names:
                store.tag(store.image(name), Reference.parse(one))

    def image_id(self, name: str) -> str:
        with self.store() as store:
            return store.image(name).id


def make_command(tmp_path: Path, name: str, **extra: str) -> Command:
    config = tmp_path / "config.toml"
    if not config.exists():
        config.write_text("")
    environment = {
        **os.environ,
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "UNIONFUSE_CONFIG": str(config),
        "UNIONFUSE_REGISTRY_TIMEOUT": "2",
        **extra,
    }
    return Command(tmp_path / name, environment)


def make_image(command: Command, name: str, layers: list[bytes]) -> None:
    """An image without a manifest and without blobs, as build and commit make them."""
    with command.store() as store, store.lease("test") as lease:
        diff_ids = tuple(lease.add_layer(io.BytesIO(layer)).diff_id for layer in layers)
        config = ImageConfig(Platform.host(), diff_ids)
        lease.add_image(config, names=[Reference.parse(name)])
