"""Parsing and planning without a store: scopes of arguments, stages, inheritance, mounts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unionimage.dockerfile.parser import DockerfileError, parse
from unionimage.dockerfile.plan import CopyAction, Options, Plan, RunAction, StagePlan, make_plan
from unionimage.dockerfile.runmount import parse_mount
from unionimage.errors import UserError
from unionimage.image_config import ImageConfig, RunConfig
from unionimage.spec import Platform
from unionimage.store import Image

LINUX = Platform("linux", "amd64")
BASE = RunConfig(env=("PATH=/bin", "FROM_BASE=1"), cmd=("sh",), user="u", working_dir="/w")


def plan(
    text: str, *, target: str = "", run: RunConfig = BASE, **build_args: str
) -> tuple[Plan, list[tuple[str, str]]]:
    """The plan, and the images that were asked for with their platforms."""
    asked: list[tuple[str, str]] = []

    def resolve(name: str, platform: Platform) -> Image:
        asked.append((name, str(platform)))
        return cast(Image, SimpleNamespace(id=name, config=ImageConfig(platform, run=run)))

    return make_plan(parse(text), Options(build_args, (), target, LINUX), resolve), asked


def last(text: str, **build_args: str) -> StagePlan:
    return plan(text, **build_args)[0].stages[-1]


def created(text: str, **build_args: str) -> list[str]:
    return [step.created_by for step in last(text, **build_args).steps]


def run_action(text: str, **build_args: str) -> RunAction:
    action = last(text, **build_args).steps[-1].action
    assert isinstance(action, RunAction)
    return action


# ---- arguments


def test_arguments_before_from_are_for_from_lines_only() -> None:
    text = "ARG V=1\nARG NAME=base:${V}\nFROM $NAME\nRUN echo $V\nARG V\nRUN echo\n"
    made, asked = plan(text, V="2")
    assert asked == [("base:2", "linux/amd64")]
    first, _, second = (step.action for step in made.stages[0].steps)
    assert isinstance(first, RunAction) and isinstance(second, RunAction)
    assert not any(entry.startswith("V=") for entry in first.env)
    assert "V=2" in second.env


def test_a_stage_hands_its_arguments_to_stages_built_on_it() -> None:
    text = "FROM b AS one\nARG A=x\nFROM b AS two\nRUN a\nFROM one\nRUN b\n"
    assert "A=x" in run_action(text).env
    assert not any(e.startswith("A=") for e in run_action(text.partition("FROM one")[0]).env)


def test_env_wins_over_arg() -> None:
    assert "A=env" in run_action("FROM b\nENV A=env\nARG A=arg\nRUN x\n", A="given").env


def test_platform_arguments() -> None:
    text = "FROM --platform=$BUILDPLATFORM b AS build\nFROM b\nARG TARGETARCH TARGETOS\nRUN x\n"
    assert {"TARGETARCH=amd64", "TARGETOS=linux"} <= set(run_action(text).env)
    made, asked = plan("FROM --platform=linux/arm64/v8 b\n")
    assert asked == [("b", "linux/arm64/v8")] and made.stages[0].platform.architecture == "arm64"


def test_proxy_settings_reach_the_process_and_nothing_that_is_kept() -> None:
    action = run_action("FROM b\nRUN x\n", HTTP_PROXY="http://user:secret@p")
    assert action.proxy == ("HTTP_PROXY=http://user:secret@p",)
    assert "secret" not in str(action._replace(proxy=()))
    assert created("FROM b\nRUN x\n", HTTP_PROXY="secret") == ["RUN /bin/sh -c x"]


def test_unused_build_arguments_are_told() -> None:
    assert plan("FROM b\nARG A\n", A="1", B="2", http_proxy="x")[0].warnings == (
        "build-arg B was not used by the Dockerfile",
    )


def test_values_within_one_env_are_those_from_before_it() -> None:
    assert created("FROM b\nENV abc=hello\nENV abc=bye def=$abc\nENV ghi=$abc\n")[1:] == [
        "ENV abc=bye def=hello",
        "ENV ghi=bye",
    ]


# ---- stages


def test_only_what_the_target_needs_is_planned_and_resolved() -> None:
    text = (
        "FROM a AS one\nFROM b AS two\nRUN --mount=from=one,target=/x y\nFROM c AS three\n"
        "FROM d AS four\nCOPY --from=two /x /\nCOPY --from=image:1 /y /\nFROM e\n"
    )
    made, asked = plan(text, target="four")
    assert [stage.name for stage in made.stages] == ["one", "two", "four"]
    assert {name for name, _ in asked} == {"a", "b", "d", "image:1"}
    assert made.stages[-1].needs == {1} and made.stages[1].needs == {0}
    assert [stage.name for stage in plan(text)[0].stages] == ["stage-4"]
    assert [stage.name for stage in plan(text, target="2")[0].stages] == ["three"]


def test_names_of_stages_do_not_care_about_case_and_the_last_wins() -> None:
    made, _ = plan("FROM a AS X\nENV n=1\nFROM a AS x\nENV n=2\nFROM X\n")
    assert "n=2" in made.stages[-1].start.run.env


def test_what_a_base_declares_is_inherited() -> None:
    stage = last('FROM b\nENTRYPOINT ["e"]\n')
    assert stage.steps[-1].run.cmd is None, "an inherited CMD is forgotten"
    assert stage.steps[-1].run.user == "u" and "FROM_BASE=1" in stage.steps[-1].run.env
    stage = last('FROM b\nCMD x\nENTRYPOINT ["e"]\nWORKDIR sub\n')
    assert stage.steps[-1].run.cmd == ("/bin/sh", "-c", "x")
    assert stage.steps[-1].run.working_dir == "/w/sub"


def test_scratch_has_a_path_for_run() -> None:
    action = last('FROM scratch\nRUN ["/x"]\n').steps[-1].action
    assert isinstance(action, RunAction) and action.env[0].startswith("PATH=/usr/local/sbin")


def test_destinations() -> None:
    def destination(text: str) -> str:
        action = last(f"FROM b\nWORKDIR /x\nCOPY a {text}\n").steps[-1].action
        assert isinstance(action, CopyAction)
        return action.destination

    cases = {".": "/x/", "./": "/x/", "y": "/x/y", "y/": "/x/y/", "/": "/", "../z": "/z"}
    cases |= {"/a/../b/": "/b/", "..": "/"}
    assert {text: destination(text) for text in cases} == cases


# ---- mounts


def test_mounts() -> None:
    def mount(text: str) -> Any:
        return parse_mount(text, lambda word: word.replace("$X", "x"))

    found = mount("target=/t")
    assert (found.type, found.source, found.read_only) == ("bind", "", True)
    found = mount('type=bind,"source=/a/../b,c",dst=/t,rw')
    assert (found.source, found.target, found.read_only) == ("b,c", "/t", False)
    found = mount("type=cache,target=/c/$X/,sharing=locked,mode=0700,uid=3,ro")
    assert (found.id, found.sharing, found.mode, found.uid) == ("/c/x", "locked", 0o700, 3)
    assert found.read_only
    assert mount("type=tmpfs,target=/t,size=1.5m").size == 3 << 19
    found = mount("type=secret,id=a.b")
    assert (found.target, found.mode, found.required) == ("/run/secrets/a.b", 0o400, False)
    found = mount("type=secret,id=a,env=TOKEN,required")
    assert (found.target, found.env, found.required) == ("", "TOKEN", True)


@pytest.mark.parametrize(
    "text",
    ["", "type=bind", "type=what,target=/x", "target", "target=/x,size=1", "type=ssh",
     "type=cache,target=/x,sharing=mine", "type=tmpfs,target=/x,size=big", "type=secret",
     "type=secret,id=a,src=b", "type=cache,target=/x,mode=9", "target=/x,ro=maybe",
     "type=cache,target=/x,uid=-1", '"target=/x', "target=/x,nonsense=1"],
)  # fmt: skip
def test_bad_mounts_are_refused(text: str) -> None:
    with pytest.raises(DockerfileError):
        parse_mount(text, lambda word: word)


# ---- parsing


def test_directives() -> None:
    text = "# syntax=docker/dockerfile:1.7\n# escape=`\nFROM b\nRUN a `\n b\nENV X=C:\\dir\n"
    made, _ = plan(text)
    assert created(text) == ["RUN /bin/sh -c a  b", "ENV X=C:\\dir"]
    assert [step.command.line for step in made.stages[0].steps] == [4, 6]
    for bad in (
        "# escape=x\nFROM b",
        "# syntax=other/frontend\nFROM b",
        "# escape=`\n# escape=`\n",
    ):
        with pytest.raises(DockerfileError):
            parse(bad)


def test_mistakes_carry_their_line() -> None:
    for text, line in [
        ("FROM b\n\n# c\nENV a\n", 4),
        ("FROM b\nRUN a \\\n  b\nBAD x\n", 4),
        ("ARG A\nRUN x\n", 2),
        ("FROM b AS 1\n", 1),
        ("FROM b\nCOPY --from=x a b\nCOPY a\n", 3),
        ("FROM b\nRUN x\nENV A=${B\n", 3),
    ]:
        with pytest.raises(DockerfileError) as raised:
            plan(text)
        assert raised.value.line == line, text
    with pytest.raises(DockerfileError):
        parse("")


FRAGMENTS = """FROM scratch|FROM b AS x|ARG A=${A:-1}|ENV A=$A B='|RUN <<E|E|RUN ["a"|FROM $A
COPY --from=x a b|COPY <<E /x|ONBUILD RUN $A|HEALTHCHECK CMD|USER|EXPOSE $A|VOLUME []|# escape=`
LABEL "a"=b c=|SHELL [""]|STOPSIGNAL $A|CMD|RUN --mount=type=cache,target=$A x|WORKDIR ${A%|\\
ADD a b c|\0|\ufeff""".replace("\n", "|").split("|")

_lines = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("\n".join) | st.text(max_size=60)


@given(_lines)
def test_any_text_is_planned_or_refused(text: str) -> None:
    try:
        plan(text)
    except UserError as error:
        assert "\n" not in error.message
