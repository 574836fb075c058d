"""The `-o` line: what each option becomes, and that nothing is silently ignored."""

from __future__ import annotations

import os

import pytest
from harness.mounts import escaped
from hypothesis import given
from hypothesis import strategies as st

from unionfuse.options import Mapping, MountFlag, MountOptions, UsageError, parse

UPPER = "upperdir=/u,workdir=/w"


def mount(line: str) -> MountOptions:
    return parse(["-o", f"lowerdir=/l,{line}", "/m"]).options


def test_the_call_of_a_mount_program() -> None:
    call = parse(["-o", "lowerdir=/top:/base,upperdir=/u,workdir=/w", "/m"])
    assert call.options.lowerdir == (b"/top", b"/base")
    assert (call.options.upperdir, call.options.workdir) == (b"/u", b"/w")
    assert call.mountpoint == b"/m"
    assert call.warnings == ()
    assert not call.options.read_only


def test_the_call_of_mount8() -> None:
    call = parse(["my-source", "/m", "-o", "rw,lowerdir=/l,dev,suid"])
    assert call.options.fsname == b"my-source"
    assert call.mountpoint == b"/m"
    assert call.options.mount_flags == MountFlag.NONE
    assert call.options.read_only


def test_the_option_list_may_be_glued_repeated_and_full_of_holes() -> None:
    call = parse(["-olowerdir=/a,,", "-o", ",upperdir=/u,,workdir=/w,", "/m"])
    assert call.options.lowerdir == (b"/a",)
    assert call.options.upperdir == b"/u"


def test_escapes() -> None:
    call = parse(["-o", r"lowerdir=/a\:b:/c\,d:/e\\f:relative,upperdir=/u\:1,workdir=/w\,1", "/m"])
    assert call.options.lowerdir == (b"/a:b", b"/c,d", b"/e\\f", b"relative")
    assert (call.options.upperdir, call.options.workdir) == (b"/u:1", b"/w,1")


paths = st.binary(min_size=1, max_size=30).filter(lambda path: b"\0" not in path)


def _escape(path: bytes) -> bytes:
    return os.fsencode(escaped(os.fsdecode(path)))


@given(st.lists(paths, min_size=1, max_size=5), paths, paths)
def test_every_path_survives_escaping(layers: list[bytes], upper: bytes, work: bytes) -> None:
    line = b"lowerdir=%s,upperdir=%s,workdir=%s,volatile" % (
        b":".join(map(_escape, layers)),
        _escape(upper),
        _escape(work),
    )
    call = parse(["-o", os.fsdecode(line), "/m"])
    assert call.options.lowerdir == tuple(layers)
    assert (call.options.upperdir, call.options.workdir) == (upper, work)
    assert call.options.volatile


@given(st.text(alphabet=st.characters(exclude_characters="\0"), max_size=60))
def test_any_line_is_understood_or_refused_in_one_line(line: str) -> None:
    try:
        parse(["-o", line.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), "/m"])
    except UsageError as error:
        assert str(error)
    except UnicodeEncodeError:
        pass  # a lone surrogate cannot stand in an argv


def test_kernel_form_of_one_layer_each() -> None:
    call = parse(["-o", "lowerdir+=/a,lowerdir+=/b:c", "/m"])
    assert call.options.lowerdir == (b"/a", b"/b:c")


def test_mappings_in_all_ways_of_writing() -> None:
    both = (Mapping(0, 1000, 1), Mapping(1, 110000, 65536))
    assert mount("uidmapping=0:1000:1:1:110000:65536").uidmapping == both
    assert mount("gidmapping=0:1000:1,1:110000:65536").gidmapping == both


@pytest.mark.parametrize("value", ["", "0", "0:1", "a:b:c", "0:1:2:3", "0:-1:2", "0:0:4294967296"])
def test_bad_mappings_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="uidmapping"):
        mount(f"uidmapping={value}")


def test_squash() -> None:
    assert mount("squash_to_root").squash_to_uid == 0
    chosen = mount("squash_to_uid=7,squash_to_root")
    assert (chosen.squash_to_uid, chosen.squash_to_gid) == (7, 0)


def test_values() -> None:
    chosen = mount(
        f"{UPPER},timeout=2.5,fsync=0,noxattrs=1,static_nlink,xattr_permissions=2,redirect_dir=off,"
        "metacopy=on,userxattr,xino=off,noacl,volatile,express=on,uring=on,passthrough=upper,spin=off,"
        "stats,log=/log,lookup_index=/i,max_read=65536"
    )
    assert chosen.timeout == 2.5
    assert (chosen.fsync, chosen.noxattrs, chosen.static_nlink) == (False, True, True)
    assert (chosen.xattr_permissions, chosen.redirect_dir, chosen.metacopy) == (2, "off", True)
    assert (chosen.userxattr, chosen.xino, chosen.noacl, chosen.volatile) == (
        True,
        "off",
        True,
        True,
    )
    assert (chosen.express, chosen.uring, chosen.passthrough) == (True, "on", "upper")
    assert chosen.spin == "off" and mount(UPPER).spin == "auto"
    assert (chosen.stats, chosen.log, chosen.lookup_index) == (True, b"/log", b"/i")
    assert chosen.max_read == 65536


def test_generic_flags_the_last_wins() -> None:
    flags = mount("ro,nodev,nosuid,noexec,noatime,dev").mount_flags
    assert flags == MountFlag.RDONLY | MountFlag.NOSUID | MountFlag.NOEXEC | MountFlag.NOATIME
    assert mount(f"{UPPER},ro").read_only
    assert not mount(f"{UPPER},ro,rw").read_only
    assert mount("default_permissions,allow_other").allow_other


def test_selinux_contexts_keep_their_commas() -> None:
    chosen = mount('context="system_u:object_r:container_file_t:s0:c1,c2",nodev')
    assert chosen.context == (b'context="system_u:object_r:container_file_t:s0:c1,c2"',)
    assert chosen.mount_flags == MountFlag.NODEV


def test_names_without_effect_are_said_once() -> None:
    call = parse(["-o", "lowerdir=/l,x-systemd.automount,_netdev,index=on,index=off", "/m"])
    assert call.warnings == ("accepted without effect: x-systemd.automount, _netdev, index",)


@pytest.mark.parametrize("name", ["bogus", "bogus=1", "lowerdirs=/x", "remount", "allow_root"])
def test_unknown_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=name.partition("=")[0]):
        mount(name)


@pytest.mark.parametrize(
    "line",
    [
        "timeout=x",
        "timeout=",
        "fsync=2",
        "redirect_dir=maybe",
        "squash_to_uid=-1",
        "volatile=1",
        "ro=1",
        "upperdir=/u",
        "workdir=/w",
        "xattr_permissions=3",
        "keeper=on,express=off",
        "express=off,uring=on",
        "express=off,spin=on",
        "spin=30",
        "lowerdir=",
    ],
)
def test_bad_values_are_refused(line: str) -> None:
    with pytest.raises(UsageError, match=line.partition("=")[0]):
        mount(line)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["/m"],
        ["-o", "ro", "/m"],
        ["-o", "lowerdir=/l"],
        ["-o", "lowerdir=/l", "a", "b", "c"],
        ["-z", "-o", "lowerdir=/l", "/m"],
        ["-o"],
    ],
)
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse(words)


def test_debug_stays_in_the_foreground() -> None:
    for words in (["-d"], ["--debug"], ["-o", "debug"]):
        chosen = parse([*words, "-o", "lowerdir=/l", "/m"]).options
        assert chosen.debug and chosen.foreground
    assert parse(["-f", "-o", "lowerdir=/l", "/m"]).options.foreground
