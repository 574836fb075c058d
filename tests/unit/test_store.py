"""The store: content comes in whole or not at all, stays while it is used, and then goes."""

import fcntl
import gzip
import importlib
import io
import os
import sqlite3
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import zstandard
from harness.disks import Disk
from harness.stores import add_image, assert_whole, layer_tar
from harness.tars import archive, member
from harness.users import NOBODY, as_user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unionimage import mounts
from unionimage.archive.load import load
from unionimage.archive.save import Wanted, save
from unionimage.changeset import tar
from unionimage.cli.rmi import remove
from unionimage.commit import commit
from unionimage.digest import Digest, chain_ids
from unionimage.errors import BadContent, Conflict, NotFound, UserError
from unionimage.image_config import ImageConfig
from unionimage.reference import Reference
from unionimage.spec import OCI_CONFIG, OCI_MANIFEST, Descriptor, Manifest, Platform
from unionimage.store import Store
from unionimage.store.check import check
from unionimage.store.locks import FileLock

PACKED = {
    "none": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "gzip members": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "zstd": lambda data: zstandard.compress(data),
}


@pytest.mark.parametrize("packing", PACKED)
def test_a_layer_comes_back_byte_for_byte(store: Store, packing: str) -> None:
    data = layer_tar()
    blob = PACKED[packing](data)
    with store.lease("test") as lease:
        layer = lease.add_layer(
            io.BytesIO(blob), diff_id=Digest.of(data), digest=Digest.of(blob), size=len(blob)
        )
        with store.layer_tar(layer.diff_id) as again:
            assert b"".join(iter(lambda: again.read(1000), b"")) == data
        if packing != "none":
            assert store.blobs.path(Digest.of(blob)).read_bytes() == blob
        assert (layer.directory / "d/hard").samefile(layer.directory / "d/file")
        assert_whole(store)


def test_layers_do_not_lie_where_others_were_just_removed(tmp_path: Path) -> None:
    """On ext4, which looks at each removed file for every new one; others know no such mark."""
    for kind in ("ext4", "xfs"):
        (tmp_path / kind).mkdir()
        disk = Disk(tmp_path / kind, kind)
        try:
            with Store.open(disk.root / "store") as store, store.lease("test") as lease:
                lease.add_layer(io.BytesIO(layer_tar()))
                assert_whole(store)
            words = ["lsattr", "-d", disk.root / "store/staging"]
            flags = subprocess.check_output(words, text=True).split()[0]
            assert ("T" in flags) is (kind == "ext4")
        finally:
            disk.unmount()


@pytest.mark.parametrize("packing", PACKED)
def test_what_is_not_as_promised_is_refused_and_leaves_nothing(store: Store, packing: str) -> None:
    data = layer_tar()
    blob = PACKED[packing](data)
    wrong = Digest.of(b"wrong")
    with store.lease("test") as lease:
        for promise in (
            {"diff_id": wrong},
            {"digest": wrong},
            {"size": len(blob) - 1, "digest": Digest.of(blob)},
            {"size": len(blob) + 1, "digest": Digest.of(blob)},
        ):
            with pytest.raises(BadContent):
                lease.add_layer(io.BytesIO(blob), **promise)
        for end in (1, 100, len(blob) // 2, len(blob) - 9):
            with pytest.raises(BadContent):
                lease.add_layer(io.BytesIO(blob[:end]), digest=Digest.of(blob))
    assert store.layers() == []
    assert os.listdir(store.root / "diff") == os.listdir(store.root / "partial") == []
    assert_whole(store)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_damaged_byte_of_a_blob_is_noticed(store: Store, data: st.DataObject) -> None:
    tar = layer_tar()
    blob = bytearray(gzip.compress(tar, mtime=0))
    digest = Digest.of(bytes(blob))
    start = data.draw(st.integers(0, len(blob) - 1))
    for at in range(start, min(len(blob), start + data.draw(st.integers(1, 20)))):
        blob[at] ^= data.draw(st.integers(1, 255))
    with store.lease("test") as lease, pytest.raises(BadContent):
        lease.add_layer(io.BytesIO(bytes(blob)), digest=digest, diff_id=Digest.of(tar))


def test_an_interrupted_layer_is_gone_on_with(store: Store) -> None:
    data = os.urandom(300_000)
    tar = archive(member("noise", data=data))
    blob = gzip.compress(tar, mtime=0)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 100_000:
                raise ConnectionResetError
            return super().read(min(size or 0, 50_000))

    with store.lease("test") as lease, pytest.raises(ConnectionResetError):
        lease.add_layer(Broken(blob), digest=Digest.of(blob))
    with store.lease("test") as lease:
        offset = lease.resume_offset(Digest.of(blob))
        assert offset > 100_000
        layer = lease.add_layer(
            io.BytesIO(blob[offset:]), digest=Digest.of(blob), diff_id=Digest.of(tar), offset=offset
        )
        assert (layer.directory / "noise").read_bytes() == data
        assert_whole(store)


def test_a_wrong_continuation_is_forgotten(store: Store) -> None:
    blob = gzip.compress(layer_tar(), mtime=0)
    digest = Digest.of(blob)
    store.partial_path(digest).write_bytes(b"\x1f\x8bnonsense")
    with store.lease("test") as lease:
        with pytest.raises(BadContent):
            lease.add_layer(io.BytesIO(blob[10:]), digest=digest, offset=10)
        assert lease.resume_offset(digest) == 0
        lease.add_layer(io.BytesIO(blob), digest=digest)


def test_a_shared_layer_is_stored_once(store: Store) -> None:
    one = add_image(store, layer_tar("a"), layer_tar("b"))
    two = add_image(store, layer_tar("a"), layer_tar("c"), name="other")
    assert len(os.listdir(store.root / "diff")) == 3
    assert one.diff_ids[0] == two.diff_ids[0]
    text = store.chain_path(chain_ids(one.diff_ids)[1]).read_text()
    assert text.split() == [diff_id.hex for diff_id in reversed(one.diff_ids)]


def test_names_move_and_ids_are_found_by_their_first_digits(store: Store) -> None:
    one = add_image(store, layer_tar("a"))
    two = add_image(store, layer_tar("b"))
    assert store.image("image:1") == two == store.image(two.id.short) == store.image(two.id)
    assert store.image(one.id).names == ()
    assert store.find("nope") is None
    with pytest.raises(NotFound, match="nope"):
        store.image("nope")
    for number in range(16):  # 16 first digits and 18 images: two ids share one
        add_image(store, layer_tar("a"), layer_tar(f"n{number}"), name=f"many:{number}")
    with pytest.raises(UserError, match="several"):
        for digit in "0123456789abcdef":
            store.find(digit)


def test_garbage_is_what_nothing_uses(store: Store) -> None:
    image = add_image(store, layer_tar("a"), layer_tar("b"))
    keep = add_image(store, layer_tar("a"), name="keep")
    with store.lease("test") as lease:
        held = lease.add_layer(io.BytesIO(layer_tar("held")))
        assert store.collect().layers == []
        store.delete_image(image)
        assert store.collect().layers == [image.diff_ids[1]]
        store.hold_layers("someone", [held.diff_id])
    assert store.collect().layers == []
    store.release("someone")
    assert store.collect().layers == [held.diff_id]
    assert [layer.diff_id for layer in store.layers()] == list(keep.diff_ids)
    assert_whole(store)


def test_an_image_that_is_used_stays(store: Store) -> None:
    image = add_image(store, layer_tar())
    store.hold("container:abc", image)
    with pytest.raises(Conflict, match="container abc"):
        remove(store, "image:1")
    store.release("container:abc")
    assert remove(store, "image:1") == ["Untagged: image:1", f"Deleted: {image.id}"]


def test_config_manifest_and_layers_must_agree(store: Store) -> None:
    image = add_image(store, layer_tar())
    with store.lease("test") as lease:
        missing = ImageConfig(Platform.host(), (Digest.of(b"missing"),))
        with pytest.raises(BadContent, match="which is not here"):
            lease.add_image(missing)
        descriptor = Descriptor(OCI_CONFIG, image.id, 1)
        manifest = Manifest(OCI_MANIFEST, descriptor, ()).to_json()
        with pytest.raises(BadContent, match="0 layers, its config 1"):
            lease.add_image(image.config_bytes, manifest=manifest)
        with pytest.raises(BadContent, match="another config"):
            lease.add_image(missing, manifest=manifest)


def test_a_newer_store_is_not_touched(root: Path) -> None:
    Store.open(root).close()
    with sqlite3.connect(root / "store.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(UserError, match="version 99"):
        Store.open(root)


def test_an_older_store_knows_its_compressed_layers(root: Path) -> None:
    with Store.open(root) as store:
        image = add_image(store, layer_tar("a"))
        with store.lease("test") as lease:
            form = lease.compress_layer(image.diff_ids[0], "gzip")
    database = sqlite3.connect(root / "store.db", isolation_level=None)
    database.execute("DROP TABLE forms")
    database.execute("PRAGMA user_version = 3")
    database.close()
    with Store.open(root) as store:
        assert store.known_forms(image.diff_ids[0], "gzip") == [form]
        assert store.known_forms(image.diff_ids[0], "zstd") == []
        store.delete_image(store.image(image.id))
        store.collect()
        assert store.find_layer(image.diff_ids[0]) is None
        assert store.known_forms(image.diff_ids[0], "gzip") == [form]
        with store.database.write() as database:
            database.execute("UPDATE forms SET seen = 0")
        store.collect()
        assert store.known_forms(image.diff_ids[0], "gzip") == []


def test_many_commands_at_once(root: Path) -> None:
    """Loads, removals and collections of the same image, side by side in several processes."""
    with Store.open(root) as store:
        image = add_image(store, layer_tar("a"), layer_tar("b"))
        with open(root / "archive.tar", "wb") as output:
            save(store, [Wanted(image, image.names)], "docker-archive", output)

    def work(seed: int) -> None:
        for turn in range(6):
            with Store.open(root) as store:
                if (seed + turn) % 3 == 0:
                    try:
                        remove(store, "image:1")
                    except UserError:
                        pass
                    store.collect()
                else:
                    with store.lease("test") as lease:
                        (loaded,) = load(lease, root / "archive.tar")
                        assert all(one.directory.is_dir() for one in loaded.layers)
                        assert loaded.layers

    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            try:
                work(seed)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with Store.open(root) as store:
        store.collect()
        assert_whole(store)


def test_no_lock_is_taken_on_a_file_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would take the lock on a new file, and the lease that it stands for is dead."""
    place = tmp_path / "x.lease"
    lock = fcntl.flock

    def too_late(descriptor: int, operation: int) -> None:
        place.unlink()
        lock(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", too_late)
        assert FileLock.try_take(place) is None
    taken = FileLock.try_take(place)
    assert taken is not None and FileLock.try_take(place) is None
    taken.release()


def test_threads_share_a_store(store: Store) -> None:
    errors = []

    def work(number: int) -> None:
        try:
            add_image(store, layer_tar("same"), layer_tar(str(number)), name=f"image:{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.images()) == 6
    assert_whole(store)


def test_memory_stays_flat(root: Path) -> None:
    """300 MB in one layer, in a process that may have 160 MB of everything."""
    script = f"""
from unionimage.store import Store
from unionimage.changeset import tar
class Big:
    left = 300
    head = tar.header(tar.Entry(b"big", tar.FILE, size=300 << 20))
    def read(self, size=-1):
        if self.head:
            data, self.head = self.head, b""
            return data
        if self.left == 0:
            self.left = -1
            return tar.END
        self.left -= self.left > 0
        return bytes(1 << 20) if self.left >= 0 else b""
with Store.open({str(root)!r}) as store, store.lease("test") as lease:
    layer = lease.add_layer(Big())
    with store.layer_tar(layer.diff_id) as stream:
        while stream.read(1 << 20): pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    # Not ru_maxrss: a child begins with what its parent had, and pytest may have a lot by then.
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100_000


class TestDedupe:
    """A file that several layers have is stored once, and no layer is another for it."""

    BIG = os.urandom(50_000)

    def layers(self, store: Store) -> tuple[Path, Path]:
        """Two layers that share `same`; `other` differs in its mode, `late` in its time."""
        names = ("same", "d/nested", "other", "late")
        made = []
        for number in range(2):
            members = [member("d", tarfile.DIRTYPE, mtime=1), member(f"only{number}")]
            for name in names:
                mode = 0o600 + number if name == "other" else 0o644
                mtime = number if name == "late" else 5
                members.append(member(name, data=self.BIG + name.encode(), mode=mode, mtime=mtime))
            made.append(add_image(store, archive(*members), name=f"image:{number}").layers[0])
        return made[0].directory, made[1].directory

    def test_hard_links_only_where_all_is_equal(self, store: Store) -> None:
        store.dedupe = "hardlink"
        one, two = self.layers(store)
        shared = [name for name in ("same", "d/nested", "other", "late")
                  if (one / name).samefile(two / name)]  # fmt: skip
        assert shared == ["same", "d/nested"]
        assert (two / "d").stat().st_mtime == 1
        assert_whole(store)
        remove(store, "image:0")
        store.collect()
        assert (two / "same").read_bytes() == self.BIG + b"same"
        assert_whole(store)

    def test_without_reflinks_nothing_is_shared(self, store: Store) -> None:
        """ext4 has none; and hard links are never made unless they were asked for."""
        one, two = self.layers(store)
        assert (one / "same").stat().st_nlink == 1
        assert not (one / "same").samefile(two / "same")

    def test_reflinks(self, scratch: Path, tmp_path: Path) -> None:
        """On a file system that has them the blocks are shared, and nothing else."""
        disk, mounted = tmp_path / "disk", scratch / "btrfs"
        mounted.mkdir()
        with open(disk, "wb") as file:
            file.truncate(200 << 20)
        subprocess.run(["mkfs.btrfs", "-q", disk], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", disk, mounted], check=True)
        try:
            with Store.open(mounted / "store") as store:
                one, two = self.layers(store)
                assert _extents(one / "same") == _extents(two / "same")
                assert _extents(one / "same") != _extents(one / "late")
                assert not (one / "same").samefile(two / "same")
                assert_whole(store)
        finally:
            subprocess.run(["umount", mounted], check=True)


def _extents(path: Path) -> list[str]:
    done = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True)
    return [line.split(":")[2] for line in done.stdout.splitlines() if line[:4].strip().isdigit()]


def test_without_privilege(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of nobody's: what it saves is what it loaded, owners and devices included."""
    home = scratch / "nobody"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    data = archive(
        member("d", tarfile.DIRTYPE, uid=5, gid=6, mode=0o500),
        member("d/file", data=b"x", uid=7, gid=8, mode=0o4000),
        member("null", tarfile.CHRTYPE, devmajor=1, devminor=3, uid=9),
        member("pipe", tarfile.FIFOTYPE, gid=9),
        member("link", tarfile.SYMTYPE, linkname="d/file", uid=11),
        member(".wh.gone"),
    )
    for module in ("index.lookup", "index.builder", "index.check", "layers.layer"):
        importlib.import_module(f"unionfuse.{module}")  # while it may still be read
    stat_of = "user.containers.override_stat"

    def run() -> list[object]:
        with Store.open(home / "store") as store:
            image = add_image(store, data)
            (layer,) = image.layers
            upper = home / "upper"
            (upper / "d").mkdir(parents=True)
            (upper / "d/new").write_text("new")
            os.setxattr(upper / "d/new", stat_of, b"5:6:0640")
            (upper / "d/own").write_text("what this user makes is root's inside")
            with store.lease("commit") as lease:
                made = commit(lease, upper, image, names=[Reference.parse("two")])
            with store.layer_tar(layer.diff_id) as stream:
                again = stream.read()
            with store.layer_tar(made.diff_ids[1]) as stream:
                (_, new, own) = tar.Reader(stream)
            assert (own.uid, own.gid) == (0, 0)
            found = [problem.what for problem in check(store)]
            remove(store, "two")
            remove(store, image.id)
            store.collect()
            return [
                again == data,
                found,
                (new.uid, new.gid, new.mode),
                os.listdir(store.root / "diff"),
            ]

    assert as_user(NOBODY, run) == [True, [], (5, 6, 0o640), []]


def test_lock_files_of_the_dead_are_removed(store: Store) -> None:
    stale = [store.root / "locks" / f"{'0' * 32}.{kind}" for kind in ("lease", "mount")]
    for path in stale:
        path.touch()
    with store.lease("alive") as lease:
        store.collect()
        left = [path.name for path in stale[0].parent.iterdir()]
        assert left == [f"{lease.owner[6:]}.lease"]


def test_a_mount_that_is_being_made_is_no_dead_one(store: Store, tmp_path: Path) -> None:
    image = add_image(store, layer_tar())
    (target := tmp_path / "mnt").mkdir()

    def look_meanwhile(words: object) -> tuple[int, str]:
        with Store.open(store.root) as other:
            (mount,) = mounts.mounts(other)
            assert (mount.target, mount.image) == (target, image.id)
            with pytest.raises(Conflict, match="somebody is mounting there"):
                mounts.mount_chain(other, image.diff_ids, target, image=image)
            with pytest.raises(Conflict):
                remove(other, image.id)
        return 1, "unionfuse: nobody answers"

    with pytest.raises(UserError, match="nobody answers"):
        mounts.mount_chain(
            store, image.diff_ids, target, driver="fuse", image=image, start=look_meanwhile
        )
    assert mounts.mounts(store) == []
    assert list((store.root / "locks").iterdir()) == []


def test_no_monitor_is_forked_with_the_database_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens the database itself; SQLite's notes of files that are open would be wrong there."""
    from unionimage.container import starting

    def open_files() -> list[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.islink(link)]

    forked = []
    monkeypatch.setattr(os, "fork", lambda: forked.append(open_files()) or 1)
    monkeypatch.setattr(os, "waitpid", lambda *_: None)
    with Store.open(tmp_path / "store") as store:
        assert any("store.db" in name for name in open_files())
        nothing: Any = None
        for pipe in starting._fork_monitor(nothing, nothing, nothing, nothing):
            pipe.close()
        (names,) = forked
        assert not [name for name in names if str(tmp_path) in name and "store.db" in name]
        assert store.images() == []
