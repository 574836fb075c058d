"""The same random actions on unionfuse and on kernel overlayfs: every outcome must be the same."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness.actions import BASE, TOP, Action, Actor, Chooser, in_arenas, random_layers
from harness.mounts import Mounted, Workshop
from harness.snapshot import assert_equal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ARENAS = 60


@st.composite
def sequences(draw: st.DrawFn) -> list[Action]:
    chooser = Chooser(lambda choices: draw(st.sampled_from(choices)))
    return [chooser.action() for _ in range(draw(st.integers(1, 25)))]


def compare(roots: Sequence[Path], actions: Sequence[Action]) -> None:
    """Do `actions` in each directory, step by step; raise AssertionError at a difference."""
    actors = [Actor(root) for root in roots]
    try:
        for number, action in enumerate(actions):
            outcomes = [actor.do(action) for actor in actors]
            assert outcomes[0] == outcomes[1], (
                f"step {number}, {action}: {outcomes[0]!r} instead of {outcomes[1]!r}, after\n"
                + "\n".join(map(repr, actions[:number]))
            )
    finally:
        for actor in actors:
            actor.close_all()


def compare_trees(ours: Mounted, oracle: Mounted) -> None:
    """The trees as they are, remounted, and each upper mounted by the other file system."""
    names = ("unionfuse", "overlayfs")
    wanted = oracle.snapshot()
    assert_equal(ours.snapshot(), wanted, names)
    ours_kind = ours.kind
    for tree in (ours, oracle):
        tree.remount()
    assert_equal(ours.snapshot(), wanted, ("unionfuse remounted", "overlayfs"))
    assert_equal(oracle.snapshot(), wanted, ("overlayfs remounted", "before"))
    ours.remount("overlay")
    assert_equal(ours.snapshot(), wanted, ("our upper in overlayfs", "overlayfs"))
    oracle.remount(ours_kind)
    assert_equal(oracle.snapshot(), wanted, ("overlayfs's upper in unionfuse", "overlayfs"))


@pytest.mark.doors
@pytest.mark.on("unionfuse")
@pytest.mark.timeout(150)
def test_random_actions_have_the_same_outcome(workshop: Workshop) -> None:
    layers = [in_arenas(TOP, ARENAS), in_arenas(BASE, ARENAS)]
    ours, oracle = workshop(*layers), workshop(*layers, kind="overlay")
    arenas = iter(range(ARENAS))

    @settings(
        max_examples=ARENAS - 20,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences())
    def run(actions: list[Action]) -> None:
        arena = f"arena{next(arenas)}"  # (shrinking may use them up; the first report stands)
        compare([ours / arena, oracle / arena], actions)

    run()
    compare_trees(ours, oracle)


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("seed", range(6))
def test_random_actions_on_random_layers(workshop: Workshop, seed: int) -> None:
    _random_run(workshop, seed, 250)


@pytest.mark.on("unionfuse")
@pytest.mark.parametrize("seed", range(50, 53))
def test_random_actions_when_the_kernel_remembers_nothing(workshop: Workshop, seed: int) -> None:
    """Each look at a name asks the daemon again, so that nothing stale in it stays hidden."""
    _random_run(workshop, seed, 250, timeout="0")


@pytest.mark.long
@pytest.mark.on("unionfuse")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_random_actions_on_random_layers(workshop: Workshop, seed: int) -> None:
    _random_run(workshop, seed, 1500)


def _random_run(workshop: Workshop, seed: int, count: int, **own: str) -> None:
    chance = random.Random(seed)
    layers = random_layers(chance, chance.choice((1, 2, 3, 5)))
    options = {"metacopy": "on"} if chance.random() < 0.3 else {}
    ours = workshop(*layers, options={**options, **own})
    oracle = workshop(*layers, options=options, kind="overlay")
    assert_equal(ours.snapshot(), oracle.snapshot(), ("unionfuse", "overlayfs"))
    chooser = Chooser(chance.choice)
    for _ in range(max(1, count // 250)):
        compare([ours.root, oracle.root], [chooser.action() for _ in range(250)])
        assert_equal(ours.snapshot(), oracle.snapshot(), ("unionfuse", "overlayfs"))
        if chance.random() < 0.3:
            ours.remount()
    ours.remount(options=options)
    compare_trees(ours, oracle)
