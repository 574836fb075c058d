"""What `check` finds in a store and mends, and that nothing is to be found after a kill."""

import gzip
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from harness.killing import kill_at_every_step
from harness.stores import add_image, assert_whole, layer_tar
from harness.tars import archive, member, tree
from unionimage.archive.load import load
from unionimage.archive.save import Wanted, save
from unionimage.cli import main
from unionimage.cli.rmi import remove
from unionimage.commit import commit
from unionimage.errors import BadContent
from unionimage.reference import Reference
from unionimage.store import Store
from unionimage.store.check import check


class TestKilled:
    """A command killed at any of its steps leaves a store that is whole, and can be redone."""

    def test_load(self, root: Path) -> None:
        other = root.with_name(root.name + "-other")
        with Store.open(other) as store:
            image = add_image(store, layer_tar("a"), layer_tar("b"))
            with open(other / "a.tar", "wb") as output:
                save(store, [Wanted(image, image.names)], "docker-archive", output)

        def action() -> None:
            with Store.open(root) as store, store.lease("load") as lease:
                load(lease, other / "a.tar")

        for _ in kill_at_every_step(action, 25):
            with Store.open(root) as store:
                assert_whole(store)
                for one in store.images():
                    remove(store, one.id)
                store.collect()
                assert os.listdir(root / "diff") == os.listdir(root / "staging") == []
        shutil.rmtree(other)

    def test_commit(self, root: Path) -> None:
        with Store.open(root) as store:
            parent = add_image(store, layer_tar("a"))
        upper = root / "upper"
        upper.mkdir()
        (upper / "new").write_text("new")

        def action() -> None:
            with Store.open(root) as store, store.lease("commit") as lease:
                commit(lease, upper, store.image(parent.id), names=[Reference.parse("new")])

        for _ in kill_at_every_step(action, 25):
            with Store.open(root) as store:
                assert_whole(store)
                if store.find("new"):
                    remove(store, "new")
                store.collect()
                assert len(os.listdir(root / "diff")) == 1

    @pytest.mark.parametrize("words", [("rmi", "image:1"), ("prune", "-af")])
    def test_rmi_and_prune(self, root: Path, words: tuple[str, ...]) -> None:
        with Store.open(root) as store:
            add_image(store, layer_tar("a"), layer_tar("b"))
        for _ in kill_at_every_step(lambda: main(["--root", str(root), *words]), 25):
            with Store.open(root) as store:
                assert_whole(store)
                count = len(store.images())
                assert len(os.listdir(root / "diff")) == 2 * count
                add_image(store, layer_tar("a"), layer_tar("b"))


DAMAGE = {
    "content": lambda directory: (directory / "d/file").write_bytes(b"y" * 500),
    "mode": lambda directory: (directory / "d/file").chmod(0o600),
    "missing": lambda directory: (directory / "link").unlink(),
    "extra": lambda directory: (directory / "extra").touch(),
    "whole": lambda directory: shutil.rmtree(directory),
    "xattr": lambda directory: os.setxattr(directory / "d", "trusted.overlay.opaque", b"y"),
}


class TestCheck:
    """Damage is found, named with the images it touches, and repaired where that can be."""

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_layer(self, store: Store, damage: str) -> None:
        image = add_image(store, gzip.compress(layer_tar()))
        before = tree(image.layers[0].directory)
        DAMAGE[damage](image.layers[0].directory)
        (problem,) = check(store)
        assert problem.images == ["image:1"]
        assert image.diff_ids[0].short in problem.what
        (problem,) = check(store, repair=True)
        assert problem.repaired
        assert tree(image.layers[0].directory) == before
        assert_whole(store)

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_layer_known_by_its_recipe_is_mended_with_what_others_have(
        self, store: Store, damage: str
    ) -> None:
        """Names, attributes and links are in the recipe, contents in the directory alone."""
        image = add_image(store, layer_tar())
        other = add_image(
            store, archive(member("d/file", data=b"x" * 500), member("z")), name="other:1"
        )
        before = tree(image.layers[0].directory)
        DAMAGE[damage](image.layers[0].directory)
        (problem,) = check(store)
        assert problem.images == ["image:1"] and not problem.repaired
        (problem,) = check(store, repair=True)
        if damage == "whole":
            assert "no other layer has 'only-x'" in problem.remedy and not problem.repaired
            add_image(store, archive(member("only-x", data=b"x")), name="third:1")
            (problem,) = check(store, repair=True)
        assert problem.repaired
        assert tree(image.layers[0].directory) == before
        assert other.layers[0].directory.is_dir()
        assert_whole(store)

    @pytest.mark.parametrize("damage", ["content", "lost"])
    def test_what_no_other_layer_has_is_named(self, store: Store, damage: str) -> None:
        image = add_image(store, layer_tar())
        path = image.layers[0].directory / "d/file"
        add_image(store, archive(member("d/file", data=b"z" * 500)), name="other:1")
        (image.layers[0].directory / "d/hard").unlink()
        path.unlink()
        if damage == "content":
            path.write_bytes(b"y" * 500)
        for repair in (False, True):
            (problem,) = check(store, repair=repair)
            assert problem.images == ["image:1"] and not problem.repaired
            assert f"'d/file' {'was changed' if damage == 'content' else 'is damaged'}" in (
                problem.what
            )
            assert problem.remedy.startswith("no other layer has 'd/file'")
            assert "load or pull the image again after 'rmi'" in problem.remedy

    def test_nothing_is_taken_from_outside_the_layers(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x" * 500)
        image = add_image(store, layer_tar())
        outwards = member("d", tarfile.SYMTYPE, linkname=str(tmp_path))
        add_image(store, archive(outwards), name="other:1")
        DAMAGE["content"](image.layers[0].directory)
        (problem,) = check(store, repair=True)
        assert not problem.repaired

    def test_a_fifo_in_place_of_a_file_holds_nobody_up(self, store: Store) -> None:
        image = add_image(store, layer_tar())
        (image.layers[0].directory / "d/file").unlink()
        os.mkfifo(image.layers[0].directory / "d/file")
        (problem,) = check(store, repair=True)
        assert not problem.repaired

    def test_a_recipe_that_is_lost(self, store: Store) -> None:
        image = add_image(store, layer_tar())
        store.recipe_path(image.diff_ids[0]).unlink()
        (problem,) = check(store, repair=True)
        assert "recipe is missing" in problem.remedy and not problem.repaired
        with pytest.raises(BadContent, match="lost"), store.layer_tar(image.diff_ids[0]):
            pass

    def test_a_damaged_blob(self, store: Store) -> None:
        image = add_image(store, gzip.compress(layer_tar()))
        (digest, _) = store.layer_blobs(image.diff_ids[0])["gzip"]
        path = store.blobs.path(digest)
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
        problems = list(check(store))
        assert digest in problems[0].what and problems[0].images == ["image:1"]
        with pytest.raises(BadContent), store.layer_tar(image.diff_ids[0]) as stream:
            while stream.read(1000):
                pass

    def test_leftovers_and_lists(self, store: Store) -> None:
        image = add_image(store, layer_tar())
        (store.root / "diff" / ("0" * 64)).mkdir()
        assert image.chain_id is not None
        store.chain_path(image.chain_id).write_text("wrong\n")
        assert len(list(check(store))) == 2
        assert all(problem.repaired for problem in check(store, repair=True))
        assert_whole(store)
