"""A small registry on loopback that misbehaves on demand, and remembers what it was asked.

It answers from `manifests` and `blobs` as a registry should, and takes uploads, unless a `Trap` is
set for a path.
"""

import hashlib
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Trap:
    """What happens to requests that match, `times` times (-1: always)."""

    pattern: str
    act: Callable[["Handler"], None]
    times: int = 1


@dataclass
class Hostile:
    """The registry; a context manager. `host` is its `127.0.0.x:PORT`."""

    address: str = "127.0.0.1"
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    traps: list[Trap] = field(default_factory=list)
    ranges: bool = True
    uploads: dict[str, bytes] = field(default_factory=dict)
    connections: int = 0

    def __enter__(self) -> "Hostile":
        self.stop = threading.Event()
        self.lock = threading.Lock()
        registry = self

        class Bound(Handler):
            hostile = registry

        self.server = ThreadingHTTPServer((self.address, 0), Bound)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def host(self) -> str:
        return f"{self.address}:{self.server.server_address[1]}"

    def trap(self, pattern: str, act: Callable[["Handler"], None], times: int = 1) -> None:
        """Let requests whose `METHOD PATH` matches the pattern be answered by `act`."""
        self.traps.append(Trap(pattern, act, times))

    def add_blob(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def add_manifest(self, tag: str, table: Any, media_type: str = OCI_MANIFEST) -> str:
        data = json.dumps(table).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.manifests[digest] = self.manifests[tag] = (media_type, data)
        return digest

    def add_image(self, tag: str, *layers: bytes, packed: Sequence[bytes] = ()) -> str:
        """An image of these layer tars; returns the manifest's digest.

        Args:
            packed: the same layers compressed by gzip, if they shall be.
        """
        diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
        data = json.dumps(config).encode()
        table = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": self.add_blob(data), "size": len(data)},
            "layers": [
                {
                    "mediaType": OCI_LAYER + ("+gzip" if packed else ""),
                    "digest": self.add_blob(blob),
                    "size": len(blob),
                }
                for blob in packed or layers
            ],
        }
        return self.add_manifest(tag, table)

    def asked_for(self, pattern: str) -> list[Asked]:
        return [one for one in self.asked if re.search(pattern, f"{one.method} {one.path}")]


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the acts below take it as their argument."""

    hostile: Hostile
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.hostile.connections += 1
        super().setup()

    body = b""

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        """End the connection here and now."""
        self.close_connection = True
        self.wfile.flush()
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        asked = Asked(self.command, self.path, dict(self.headers.items()))
        with self.hostile.lock:
            self.hostile.asked.append(asked)
            line = f"{self.command} {self.path}"
            trap = next(
                (t for t in self.hostile.traps if t.times and re.search(t.pattern, line)), None
            )
            if trap is not None:
                trap.times -= 1
        try:
            if trap is not None:
                trap.act(self)
                return
            asked.body = self.body = self.rfile.read(length)
            self.serve()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

    def serve(self) -> None:
        """What a well-behaved registry would do."""
        _, _, rest = self.path.partition("/v2/")
        if not rest:
            self.answer(200, b"{}")
        elif "/blobs/uploads/" in rest:
            self.serve_upload(rest.rpartition("/")[2])
        elif self.command == "PUT":
            tag = rest.rpartition("/")[2]
            self.hostile.manifests[tag] = (self.headers["Content-Type"], self.body)
            self.answer(201)
        elif match := re.search(r"/manifests/(.+)$", rest):
            found = self.hostile.manifests.get(match[1])
            if found is None:
                self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
            else:
                self.answer(200, found[1], Content_Type=found[0])
        elif match := re.search(r"/blobs/(sha256:[0-9a-f]{64})$", rest):
            self.serve_blob(self.hostile.blobs.get(match[1]))
        elif "/tags/list" in rest:
            self.answer(200, json.dumps({"name": "x", "tags": self.hostile.tags}).encode())
        else:
            self.answer(404)

    def serve_upload(self, name: str) -> None:
        """POST begins, PATCH adds, GET tells how far it is, PUT ends."""
        uploads = self.hostile.uploads
        name, _, query = name.partition("?")
        if self.command == "POST":
            name = f"u{len(uploads)}"
            uploads[name] = b""
        if self.command in ("PATCH", "PUT"):
            span = self.headers.get("Content-Range")
            if span and int(span.partition("-")[0]) != len(uploads[name]):
                self.answer(416)
                return
            uploads[name] += self.body
        if self.command == "PUT":
            digest = urllib.parse.parse_qs(query)["digest"][0]
            stored = self.hostile.add_blob(uploads.pop(name))
            self.answer(201 if stored == digest else 400)
            return
        where = f"/v2/team/app/blobs/uploads/{name}"
        reached = max(0, len(uploads[name]) - 1)
        code = 204 if self.command == "GET" else 202
        self.answer(code, Location=where, Range=f"0-{reached}")

    def serve_blob(self, data: bytes | None) -> None:
        if data is None:
            self.answer(404, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}')
            return
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and self.hostile.ranges:
            start = int(match[1])
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[start:], Content_Range=span)
        else:
            self.answer(200, data)


def cut_after(data: bytes, count: int) -> Callable[[Handler], None]:
    """Send `count` bytes of a body that was announced whole, then hang up."""

    def act(handler: Handler) -> None:
        handler.answer(200, data[:count], Content_Length=str(len(data)))
        handler.cut()

    return act


def stall_after(data: bytes, count: int) -> Callable[[Handler], None]:
    """Send `count` bytes, then nothing more while the client waits."""

    def act(handler: Handler) -> None:
        handler.answer(200, data[:count], Content_Length=str(len(data)))
        handler.wfile.flush()
        handler.hostile.stop.wait(20)
        handler.close_connection = True

    return act


def drip(data: bytes, pause: float) -> Callable[[Handler], None]:
    """Send a byte at a time."""

    def act(handler: Handler) -> None:
        handler.answer(200, b"", Content_Length=str(len(data)))
        for byte in data:
            if handler.hostile.stop.is_set():
                break
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(pause)
        handler.close_connection = True

    return act


def cut_upload(count: int) -> Callable[[Handler], None]:
    """Take `count` bytes of a PATCH into the upload, then hang up."""

    def act(handler: Handler) -> None:
        name = handler.path.rpartition("/")[2]
        handler.hostile.uploads[name] += handler.rfile.read(count)
        handler.cut()

    return act


def status(code: int, body: bytes = b"", **headers: str) -> Callable[[Handler], None]:
    """Answer with a status; header names are written with underscores."""

    def act(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        handler.answer(code, body, **headers)

    return act
