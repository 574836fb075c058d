"""Variable expansion: docker's documented cases, and bash as an oracle for random words."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unionimage.dockerfile.expand import expand, expand_document, split
from unionimage.dockerfile.parser import DockerfileError

VARIABLES = {"foo": "abcXabc", "path": "a/b/c.tar.gz", "empty": "", "PWD": "/home", "ko": "한국어"}

CASES = {
    r"plain": "plain",
    r"a'b c'd": "ab cd",
    r'"a $PWD b"': "a /home b",
    r"'$PWD'": "$PWD",
    r"\$PWD": "$PWD",
    r'"\$PWD\n"': r"$PWD\n",
    r"a\tb": "atb",
    r"end\\": "end" + "\\",
    r"end" + "\\": "end",
    r"$PWD/x": "/home/x",
    r"${PWD}x": "/homex",
    r"$unset.": ".",
    r"$.": "$.",
    r"he$1x": "hex",
    r"${9:-z}": "z",
    r"$ko": "한국어",
    r"${unset:-${empty:-${PWD}}}": "/home",
    r"${empty-x}": "",
    r"${empty:-x}": "x",
    r"${PWD:+set}${unset:+set}": "set",
    r"${empty+set}${empty:+no}": "set",
    r"${PWD?no}": "/home",
    r"${foo#a*c}": "Xabc",
    r"${foo##a*c}": "",
    r"${foo%a*c}": "abcX",
    r"${foo%%a*c}": "",
    r"${path##*/}": "c.tar.gz",
    r"${path%.*}": "a/b/c.tar",
    r"${path%%.*}": "a/b/c",
    r"${foo/b/-}": "a-cXabc",
    r"${foo//b/-}": "a-cXa-c",
    r"${path//\//:}": "a:b:c.tar.gz",
    r"${foo/b*X/}": "aabc",
    r"${unset:-a{b}c}": "a{bc}",
}


@pytest.mark.parametrize("word", CASES)
def test_word(word: str) -> None:
    assert expand(word, VARIABLES) == CASES[word]


@pytest.mark.parametrize(
    "word",
    ["'open", '"open', "${foo", "${}", "${:-x}", "${foo:=x}", "${{foo}", "${foo:x}", "${unset?}",
     "${empty:?}", "${foo:#a}", "${foo/a}", r"${foo#\a}", "${unset:-${x}"],
)  # fmt: skip
def test_what_is_refused_names_the_word(word: str) -> None:
    with pytest.raises(DockerfileError) as raised:
        expand(word, VARIABLES)
    assert repr(word) in str(raised.value)


def test_required_variables_give_the_message_of_their_author() -> None:
    with pytest.raises(DockerfileError, match="unset: give me one"):
        expand("${unset:?give me one}", VARIABLES)


def test_the_escape_character_can_be_another() -> None:
    assert expand(r"C:\dir`$x", {}, "`") == r"C:\dir$x"


def test_split_divides_at_unquoted_blanks_only() -> None:
    assert split("""80 "a b" $list 'c d'""", {"list": "1 2"}) == ["80", "a b", "1", "2", "c d"]


def test_documents_keep_their_quotes() -> None:
    assert expand_document('it\'s "$PWD" \\$PWD\n', VARIABLES) == 'it\'s "/home" $PWD\n'


# ---- bash as an oracle

_names = st.sampled_from(["foo", "path", "empty", "unset", "PWD"])
_literals = st.text("abcX./0", min_size=1, max_size=4)
_patterns = st.lists(
    st.sampled_from(["*", "?", "a", "b", "c", "X", r"\*", r"\?", "."]), max_size=4
).map("".join)


def _braces(words: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    defaults = st.builds(
        lambda name, sign, word: f"${{{name}{sign}{word}}}",
        _names, st.sampled_from([":-", "-", ":+", "+"]), words,
    )  # fmt: skip
    return defaults | st.builds(lambda left, right: left + right, words, words)


_words = st.recursive(
    _literals
    | _names.map(lambda name: f"${{{name}}}")
    | _names.map(lambda name: f"${name}/")
    | _literals.map(lambda text: f"'${text}'")
    | st.sampled_from(["\\$", "\\'", '\\"', "\\\\", "\\a"])
    | st.builds(lambda text, name: f'"{text} ${{{name}}} \\$\\"\'"', _literals, _names)
    | st.builds(
        lambda name, sign, pattern: f"${{{name}{sign}{pattern}}}",
        _names, st.sampled_from(["#", "##", "%", "%%"]), _patterns,
    )
    | st.builds(
        lambda name, sign, pattern, text: f"${{{name}{sign}{pattern}/{text}}}",
        _names, st.sampled_from(["/", "//"]), _patterns.filter(lambda p: p.strip("*")),
        st.text("abX0", max_size=3),
    ),
    _braces,
    max_leaves=5,
)  # fmt: skip


@given(st.lists(_words, min_size=1, max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bash_agrees(words: list[str]) -> None:
    lines = [f"{name}='{value}'" for name, value in VARIABLES.items()]
    lines += [f"v={word}; printf '%s\\0' \"$v\"" for word in words]
    shell = subprocess.run(
        ["bash", "-c", "\n".join(lines)], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    expected = shell.stdout.decode().split("\0")[:-1]
    assert [expand(word, VARIABLES) for word in words] == expected


@given(st.text("ab$\\'\"{}:-+?#%/`<* \n", max_size=30))
def test_nothing_but_its_own_error_comes_out(word: str) -> None:
    try:
        expand(word, VARIABLES)
        split(word, VARIABLES, "`")
        expand_document(word, VARIABLES)
    except DockerfileError:
        pass
