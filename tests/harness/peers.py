"""podman, buildah and docker with a store of their own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peer_directory() -> Iterator[Path]:
    """A directory for what a peer keeps.

    It is not pytest's: podman refuses a runroot of more than 50 characters, and docker mounts
    something in its directory for as long as it runs.
    """
    with tempfile.TemporaryDirectory(prefix="peer-") as directory:
        yield Path(directory)


@contextmanager
def container_storage() -> Iterator[list[str]]:
    """The options that give podman and buildah a store of their own."""
    with peer_directory() as directory:
        yield [f"--root={directory}/root", f"--runroot={directory}/run", "--storage-driver=vfs"]
