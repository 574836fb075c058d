"""Our NamedTuple against typing's."""

import copy
import pickle
import typing
from functools import cached_property

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unionimage.tuples import NamedTuple


class Ours(NamedTuple):
    """A value."""

    a: int
    b: str = "b"
    c: tuple[int, ...] = ()

    @property
    def double(self) -> int:
        return 2 * self.a


class Typings(typing.NamedTuple):
    a: int
    b: str = "b"
    c: tuple[int, ...] = ()


class Wider(Ours):
    @cached_property
    def kept(self) -> object:
        return object()


ARGUMENTS = st.tuples(
    st.lists(st.integers(), max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.text(max_size=3)),
)


@given(ARGUMENTS)
def test_it_takes_what_typings_takes(arguments: tuple[list[int], dict[str, str]]) -> None:
    values, named = arguments
    try:
        expected = Typings(*values, **named)
    except TypeError:
        with pytest.raises(TypeError, match="Ours"):
            Ours(*values, **named)
        return
    made = Ours(*values, **named)
    assert made == expected and hash(made) == hash(expected)
    assert (made.a, made.b, made.c) == expected
    assert repr(made) == repr(expected).replace("Typings", "Ours")
    assert made._asdict() == expected._asdict()


def test_it_is_a_value() -> None:
    made = Ours(1, c=(2,))
    assert made._replace(b="x") == (1, "x", (2,)) and type(made._replace(b="x")) is Ours
    assert Ours._make([1, "y", ()]) == Ours(1, "y")
    assert Ours._fields == Typings._fields and Ours._field_defaults == Typings._field_defaults
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    assert made.double == 2 and Ours.__doc__ == "A value."
    with pytest.raises(AttributeError):
        made.a = 2
    with pytest.raises(AttributeError):
        made.other = 2
    with pytest.raises(TypeError):
        made._replace(d=1)
    match made:
        case Ours(a, "b", _):
            assert a == 1


def test_a_subclass_keeps_what_it_worked_out() -> None:
    made = Wider(1)
    assert made.kept is made.kept
    assert type(made._replace(a=3)) is Wider and made == Ours(1)
