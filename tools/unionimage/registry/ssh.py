"""Copy an image to another machine over one ssh connection; only missing layers move.

The other side runs `unionfuse copy --receive`. One side speaks at a time:

    sender    an offer: a line of JSON (names, sizes, layers), then the manifest and the config
    receiver  a line of JSON: the layers that it lacks, and from which byte on
    sender    those layers, one after the other, each exactly as long as offered
    receiver  a line of JSON: the image id, or an error

Every line of the receiver begins with `MARK`: what a login shell prints before it is passed over.
The receiver trusts nothing: the store verifies digests and sizes as in a pull.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from unionimage.digest import CHUNK, MAX_JSON, Digest
from unionimage.errors import BadContent, UserError
from unionimage.image_config import ImageConfig
from unionimage.json_object import load_object
from unionimage.progress import Reporter
from unionimage.reference import Reference
from unionimage.registry.errors import RegistryError, printable
from unionimage.registry.outgoing import AS_IT_IS, Outgoing, Wanted
from unionimage.spec import Descriptor, compression_of
from unionimage.store import Image, Lease, Store
from unionimage.tuples import NamedTuple

MARK = b"unionfuse-copy-1 "
LONGEST_LINE = 1 << 20
MOST_NOISE = 1 << 20


class Target(NamedTuple):
    """Where to copy to: `ssh://[USER@]HOST[:PORT]`."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises UserError for anything that is no such address."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise UserError(f"{printable(text)}: {error}") from None
        host, user = parts.hostname, parts.username
        if parts.scheme != "ssh" or not host or parts.path.strip("/") or parts.query:
            raise UserError(f"{printable(text)}: is no address; give ssh://[USER@]HOST[:PORT]")
        if parts.password is not None:
            raise UserError("a password does not belong into an address; use a key")
        if host.startswith("-") or (user or "").startswith("-"):
            raise UserError(f"{printable(text)}: host and user must not begin with '-'")
        return cls(host, user, port)

    def command(self, ssh: Sequence[str], remote: str, compress: bool) -> list[str]:
        """The ssh command line that starts the receiver."""
        words = [*ssh]
        if compress:
            words.append("-C")
        if self.port is not None:
            words += ["-p", str(self.port)]
        host = f"{self.user}@{self.host}" if self.user else self.host
        return [*words, "--", host, f"{remote} copy --receive"]

    def __str__(self) -> str:
        return self.host


class Copied(NamedTuple):
    """What a copy moved."""

    image_id: Digest
    layers: int
    bytes: int


def copy(
    store: Store,
    image: Image,
    names: Sequence[Reference],
    target: Target,
    report: Reporter,
    *,
    ssh: str = "ssh",
    remote: str = "unionfuse",
) -> Copied:
    """Send an image to `target`.

    Args:
        names: what it is called there.
        ssh: the ssh command with its options.
        remote: the command that is unionfuse there, with options such as `--root`.

    Raises:
        UserError: ssh fails, there is no unionfuse there, or it refuses what was sent.
    """
    with store.lease(f"copy {image.id.short}") as lease:
        outgoing = Outgoing(store, lease, image, AS_IT_IS)
        if outgoing.original is None:
            outgoing = Outgoing(store, lease, image, Wanted(compression="none"))
        layers = [outgoing.layer(position) for position in range(len(image.diff_ids))]
        compress = any(compression_of(layer.media_type) == "none" for layer in layers)
        command = target.command(shlex.split(ssh), remote, compress)
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise RegistryError(command[0], error.strerror or str(error), "install ssh") from error
        try:
            return _send(process, outgoing, layers, names, target, report)
        finally:
            _end(process)


def receive(store: Store, source: BinaryIO, answers: BinaryIO) -> int:
    """The other side of `copy`; returns the exit code. Errors go to the sender."""
    try:
        image_id = _receive(store, source, answers)
    except UserError as error:
        _say(answers, {"error": error.message})
        return 1
    _say(answers, {"id": image_id})
    return 0


def _send(
    process: subprocess.Popen[bytes],
    outgoing: Outgoing,
    layers: Sequence[Descriptor],
    names: Sequence[Reference],
    target: Target,
    report: Reporter,
) -> Copied:
    assert process.stdin is not None and process.stdout is not None
    image, link = outgoing.image, process.stdin
    manifest = outgoing.original[0] if outgoing.original else b""
    offer = {
        "names": [str(name) for name in names],
        "manifest": len(manifest),
        "config": len(image.config_bytes),
        "layers": [layer.to_object() for layer in layers],
    }
    sent = 0
    try:
        _write(link, json.dumps(offer).encode() + b"\n" + manifest + image.config_bytes)
        wants = _wants(_hear(process, target), layers)
        for diff_id in {d: n for n, d in enumerate(image.diff_ids) if n not in wants}:
            report.task(diff_id.short, "Layer already exists").done("Layer already exists")
        for position, offset in wants.items():
            layer = layers[position]
            task = report.task(image.diff_ids[position].short, "Copying", layer.size)
            task.advance(offset)
            with outgoing.open_layer(position, layer) as blob:
                skip = offset
                while data := blob.read(CHUNK):
                    data, skip = data[skip:], max(0, skip - len(data))
                    _write(link, data)
                    task.advance(len(data))
                    sent += len(data)
            task.done("Copied")
        answer = _hear(process, target)
    except BrokenPipeError:
        answer = _hear(process, target)  # it says why it hung up
    return Copied(Digest(str(answer.get("id"))), len(wants), sent)


def _wants(answer: dict[str, Any], layers: Sequence[Descriptor]) -> dict[int, int]:
    """The layers that the other side lacks, and the byte from which on."""
    try:
        table = {int(position): int(offset) for position, offset in answer["wants"]}
    except (LookupError, TypeError, ValueError) as error:
        raise BadContent("the other side's answer is not understood") from error
    for position, offset in table.items():
        if not 0 <= position < len(layers) or not 0 <= offset <= layers[position].size:
            raise BadContent("the other side asks for a layer that was not offered")
    return table


def _hear(process: subprocess.Popen[bytes], target: Target) -> dict[str, Any]:
    """The receiver's next line; what else comes before it is passed over."""
    assert process.stdout is not None
    noise = 0
    while line := process.stdout.readline(LONGEST_LINE):
        if line.startswith(MARK):
            answer = load_object(line[len(MARK) :], f"{target}: answer")
            if "error" in answer:
                raise RegistryError(str(target), printable(str(answer["error"])))
            return answer
        noise += len(line)
        if noise > MOST_NOISE:
            raise RegistryError(str(target), "is no unionfuse", "check --remote-command")
    code = process.wait()
    if code == 127:
        raise RegistryError(
            str(target), "unionfuse is not found there", "install it or use --remote-command"
        )
    if code == 255:
        raise RegistryError(str(target), "ssh could not connect", "try ssh by hand")
    raise RegistryError(str(target), f"the connection ended early (exit code {code})", "try again")


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    process.stdout.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _write(link: Any, data: bytes) -> None:
    link.write(data)
    link.flush()


def _say(answers: BinaryIO, table: dict[str, Any]) -> None:
    answers.write(MARK + json.dumps(table).encode() + b"\n")
    answers.flush()


def _receive(store: Store, source: BinaryIO, answers: BinaryIO) -> Digest:
    offer = load_object(source.readline(LONGEST_LINE), "offer")
    try:
        names = [Reference.parse(str(name)) for name in offer["names"]]
        sizes = int(offer["manifest"]), int(offer["config"])
        layers = [Descriptor.from_object(layer) for layer in offer["layers"]]
    except (LookupError, TypeError, ValueError) as error:
        raise BadContent("the offer is not understood; install the same version there") from error
    if not all(0 <= size <= MAX_JSON for size in sizes):
        raise BadContent("the offer's manifest or config is too long")
    manifest = _Section(source, sizes[0]).all()
    config_bytes = _Section(source, sizes[1]).all()
    config = ImageConfig.from_json(config_bytes)
    if len(layers) != len(config.diff_ids):
        raise BadContent("the offer and its config differ in the number of layers")
    with store.lease(f"receive {Digest.of(config_bytes).short}") as lease:
        wants = _missing(lease, layers, config.diff_ids)
        _say(answers, {"wants": list(wants.items())})
        for position, offset in wants.items():
            layer = layers[position]
            section = _Section(source, layer.size - offset)
            lease.add_layer(
                section,
                diff_id=config.diff_ids[position],
                digest=layer.digest,
                size=layer.size,
                offset=offset,
                resumable=True,
            )
            section.all()
        return lease.add_image(config_bytes, manifest=manifest or None, names=names).id


def _missing(
    lease: Lease, layers: Sequence[Descriptor], diff_ids: Sequence[Digest]
) -> dict[int, int]:
    wants: dict[int, int] = {}
    seen = set()
    for position, diff_id in enumerate(diff_ids):
        if diff_id not in seen and lease.use_layer(diff_id) is None:
            wants[position] = lease.resume_offset(layers[position].digest)
        seen.add(diff_id)
    return wants


class _Section:
    """The next `size` bytes of a stream, as a stream.

    Raises (from `read`):
        RegistryError: the stream ends before; what came of a layer is kept for the next time.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        if not wanted:
            return b""
        data = self._stream.read(wanted)
        if not data:
            raise RegistryError(
                "copy", f"the connection ended {self._left} bytes early", "try again"
            )
        self._left -= len(data)
        return data

    def all(self) -> bytes:
        return b"".join(iter(lambda: self.read(CHUNK), b""))
