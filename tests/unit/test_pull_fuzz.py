"""Whatever a registry answers, choosing an image ends in an image or in one line for the user."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from unionimage.digest import Digest
from unionimage.errors import UserError
from unionimage.reference import Reference
from unionimage.registry.client import RawManifest, _true_media_type
from unionimage.registry.pull import _find_in
from unionimage.spec import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Platform,
)

LAYER = "sha256:" + "1" * 64
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {"Env": ["A=b"], "Labels": {"a": "b"}, "Healthcheck": {"Test": ["NONE"]}},
    "rootfs": {"type": "layers", "diff_ids": [LAYER]},
    "history": [{"created_by": "x"}, {"created_by": "y", "empty_layer": True}],
}


class FakeRepository:
    """Manifests and blobs out of a dictionary; what a verified transfer would give."""

    def __init__(self) -> None:
        self.manifests: dict[str, RawManifest] = {}
        self.blobs: dict[str, bytes] = {}

    def add(self, data: bytes, tag: str = "") -> Descriptor:
        digest = Digest.of(data)
        try:
            media_type = _true_media_type(data, "", "fake")
        except UserError:
            media_type = "?"
        self.manifests[tag or digest] = RawManifest(media_type, digest, data)
        return Descriptor(media_type, digest, len(data))

    def manifest(self, wanted: str) -> RawManifest:
        found = self.manifests.get(str(wanted))
        if found is None:
            raise UserError("not found")
        _true_media_type(found.data, "", "fake")  # which the client does as well
        return found

    def small_blob(self, descriptor: Descriptor) -> bytes:
        if descriptor.digest not in self.blobs:
            raise UserError("not found")
        return self.blobs[descriptor.digest]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([LAYER, OCI_MANIFEST, OCI_INDEX, OCI_LAYER_GZIP, "linux", "../x", "\x1b[2J"]),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [here]
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*here, key))
    return found


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> bytes:
    """JSON of a value with a few places changed; seldom not JSON at all."""
    for _ in range(draw(st.integers(0, 2))):
        value = changed(value, draw(st.sampled_from(places(value))), draw(VALUES))
    data = json.dumps(value).encode()
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(data)))
        data = data[:cut] + draw(st.binary(max_size=5))
    return data


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_answer_is_survived(data: st.DataObject) -> None:
    repository = FakeRepository()
    config = data.draw(mutated(CONFIG))
    digest = Digest.of(config)
    repository.blobs[digest] = config
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": Descriptor(OCI_CONFIG, digest, len(config)).to_object(),
        "layers": [Descriptor(OCI_LAYER_GZIP, Digest(LAYER), 5).to_object()],
    }
    inner = repository.add(data.draw(mutated(manifest)))
    index = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            {**inner.to_object(), "platform": {"os": "linux", "architecture": "amd64"}},
            {**inner.to_object(), "platform": {"os": "linux", "architecture": "arm64"}},
        ],
    }
    repository.add(data.draw(mutated(index)), "1")
    reference = Reference.parse("localhost:5000/x:1")
    try:
        found = _find_in(repository, reference, "1", Platform("linux", "amd64"))
    except UserError as error:
        assert "\n" not in error.message
    else:
        assert len(found.config.diff_ids) == len(found.manifest.layers)
        list(found.layers())
