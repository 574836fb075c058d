"""A real registry (Debian's docker-registry) on loopback, and images made by hand for it."""

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
TYPES = {
    "oci": (OCI + "manifest.v1+json", OCI + "config.v1+json", OCI + "layer.v1.tar"),
    "docker": (
        DOCKER + "distribution.manifest.v2+json",
        DOCKER + "container.image.v1+json",
        DOCKER + "image.rootfs.diff.tar",
    ),
}


@dataclass
class Registry:
    """A `docker-registry serve` of its own; a context manager.

    Args:
        root: an empty directory for its data.
        password: for the user `jo`; None: no authentication.
        tls: whether to serve with a certificate that nobody knows.
        auth: the `auth` section of its configuration, in place of `password`.
    """

    root: Path
    password: str | None = None
    tls: bool = False
    auth: dict[str, Any] | None = None
    host: str = field(default="", init=False)

    def __enter__(self) -> "Registry":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        self.root.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.root / "data")}},
            "http": {"addr": self.host},
        }
        if self.password is not None:
            entry = subprocess.run(
                ["htpasswd", "-Bbn", "jo", self.password], check=True, capture_output=True
            )
            (self.root / "htpasswd").write_bytes(entry.stdout)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(self.root / "htpasswd")}}
        if self.auth is not None:
            config["auth"] = self.auth
        if self.tls:
            make_certificate(self.root)
            config["http"]["tls"] = {
                "certificate": str(self.root / "cert.pem"),
                "key": str(self.root / "key.pem"),
            }
        (self.root / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        self.log = open(self.root / "log", "wb")
        self.process = subprocess.Popen(
            ["docker-registry", "serve", str(self.root / "config.yml")],
            stdout=self.log,
            stderr=self.log,
        )
        self._wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.close()

    def forget(self, path: str, digest: str) -> None:
        """Lose a blob of the repository `path`, as a disk would."""
        algorithm, _, digits = digest.partition(":")
        data = self.root / "data/docker/registry/v2"
        shutil.rmtree(data / "repositories" / path / "_layers" / algorithm / digits)
        shutil.rmtree(data / "blobs" / algorithm / digits[:2] / digits)

    def tag_written(self, path: str, tag: str) -> int:
        """When the registry last wrote what a tag points at, in its clock."""
        tags = self.root / "data/docker/registry/v2/repositories" / path / "_manifests/tags"
        return (tags / tag / "current/link").stat().st_mtime_ns

    def _wait(self) -> None:
        host, _, port = self.host.partition(":")
        for _ in range(200):
            if self.process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError((self.root / "log").read_text())


def make_certificate(directory: Path) -> None:
    """A self-signed certificate for 127.0.0.1: cert.pem and key.pem."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )


def layer_tar(files: dict[str, bytes | None]) -> bytes:
    """A layer: name → content, None for a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.mtime = 1_700_000_000
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            else:
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def compress(data: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(data, mtime=0)
    if how == "zstd":
        return subprocess.run(["zstd", "-qc"], input=data, check=True, capture_output=True).stdout
    return data


class OciLayout:
    """An OCI image layout on disk, which skopeo copies from: `oci:DIRECTORY:TAG`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self.index: list[dict[str, Any]] = []

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data)
        (self.directory / "blobs" / digest.replace(":", "/")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def image(
        self,
        tag: str,
        layers: list[bytes],
        compression: str = "gzip",
        kind: str = "oci",
        architecture: str = "amd64",
    ) -> dict[str, Any]:
        """Add an image; returns its manifest's descriptor."""
        manifest_type, config_type, layer_type = TYPES[kind]
        joint = "+" if kind == "oci" else "."
        layer_type += "" if compression == "none" else joint + compression
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"], "Labels": {"made": "by hand"}},
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
            "history": [{"created_by": f"step {n}"} for n in range(len(layers))],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": self.blob(json.dumps(config).encode(), config_type),
            "layers": [self.blob(compress(layer, compression), layer_type) for layer in layers],
        }
        entry = self.blob(json.dumps(manifest).encode(), manifest_type)
        self._name(entry, tag)
        return {**entry, "platform": {"os": "linux", "architecture": architecture}}

    def many(self, tag: str, manifests: list[dict[str, Any]]) -> dict[str, Any]:
        """Add an index of images for several platforms."""
        index = {
            "schemaVersion": 2,
            "mediaType": OCI + "index.v1+json",
            "manifests": manifests,
        }
        entry = self.blob(json.dumps(index).encode(), OCI + "index.v1+json")
        self._name(entry, tag)
        return entry

    def _name(self, entry: dict[str, Any], tag: str) -> None:
        annotations = {"org.opencontainers.image.ref.name": tag}
        self.index.append({**entry, "annotations": annotations})
        text = json.dumps({"schemaVersion": 2, "manifests": self.index})
        (self.directory / "index.json").write_text(text)

    def push(self, tag: str, target: str, *options: str) -> None:
        """Let skopeo copy an image to `HOST/NAME:TAG`, unchanged."""
        entry = next(e for e in self.index if tag in e["annotations"].values())
        source = f"oci:{self.directory}:{tag}"
        if entry["mediaType"].startswith(DOCKER):  # which an OCI layout must not hold
            source = f"dir:{self._as_directory(entry)}"
        skopeo(
            *("copy", "--all", "--preserve-digests", "--dest-tls-verify=false"),
            *(*options, source, f"docker://{target}"),
        )

    def _as_directory(self, entry: dict[str, Any]) -> Path:
        blobs = self.directory / "blobs/sha256"
        manifest = (blobs / entry["digest"][7:]).read_bytes()
        target = self.directory / f"dir-{entry['digest'][7:19]}"
        target.mkdir(exist_ok=True)
        (target / "version").write_text("Directory Transport Version: 1.1\n")
        (target / "manifest.json").write_bytes(manifest)
        table = json.loads(manifest)
        for blob in (table["config"], *table["layers"]):
            name = blob["digest"][7:]
            (target / name).write_bytes((blobs / name).read_bytes())
        return target


def skopeo(*words: str) -> str:
    return run("skopeo", "--insecure-policy", *words)


def run(*words: str, **environment: str) -> str:
    """Run a peer; its standard output. An error shows its standard error."""
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def raw_digest(target: str) -> str:
    """The digest of what a name points at, by skopeo."""
    return sha256(skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{target}").encode())
