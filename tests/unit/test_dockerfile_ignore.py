"""`.dockerignore`: moby's documented cases, and properties that hold for every pattern."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unionimage.dockerfile.ignore import Patterns, read_ignore_file
from unionimage.dockerfile.parser import DockerfileError

CASES = [
    ("**", "file", True),
    ("**/", "dir/file", True),
    ("dir/**", "dir/a/b", True),
    ("dir/**", "dir", False),
    ("**/dir", "dir", True),
    ("**/dir", "a/b/dir/file", True),
    ("**file", "dir/file", True),
    ("**file", "dir/afile", True),
    ("**/file", "dir/afile", False),
    ("**/file*.txt", "dir/dir/file.txt", True),
    ("**/**/*.txt", "file.txt", True),
    ("**/**/*.txt2", "dir/file.txt", False),
    ("a**/*.txt", "a/dir/dir/file.txt", True),
    ("a/*.txt", "a/dir/file.txt", False),
    ("a[b-d]e", "ace", True),
    ("a[b-d]e", "aae", False),
    ("a[^b-d]e", "aze", True),
    (".*", ".foo", True),
    (".*", "foo", False),
    ("abc.def", "abcZdef", False),
    ("abc?def", "abcZdef", True),
    ("abc?def", "abc/def", False),
    ("a\\\\", "a\\", True),
    ("a\\*b", "a*b", True),
    ("a\\*b", "axb", False),
    ("a(b)c/def", "a(b)c/def", True),
    ("a.|)$(}+{bc", "a.|)$(}+{bc", True),
    ("*", "a/b/c", True),
    ("docs", "docs/a/b", True),
    ("docs", "docs2", False),
    ("*/temp*", "somedir/temporary.txt", True),
    ("*/*/temp*", "a/temporary", False),
]


@pytest.mark.parametrize(("pattern", "path", "excluded"), CASES)
def test_one_pattern(pattern: str, path: str, excluded: bool) -> None:
    assert Patterns([pattern]).excludes(path) is excluded


@pytest.mark.parametrize(
    ("patterns", "path", "excluded"),
    [
        (["docs", "!docs/README.md"], "docs/README.md", False),
        (["docs", "!docs/README.md"], "docs/other", True),
        (["!a.go", "*.go"], "a.go", True),
        (["*.go", "!a.go"], "a.go", False),
        (["**", "!util/docker/web"], "util/docker/web/foo", False),
        (["**", "!util/docker/web", "util/docker/web/foo"], "util/docker/web/foo", True),
        (["*.md", "!README*.md", "README-secret.md"], "README-secret.md", True),
        ([], "a", False),
    ],
)
def test_the_last_pattern_that_matches_decides(
    patterns: list[str], path: str, excluded: bool
) -> None:
    assert Patterns(patterns).excludes(path) is excluded


def test_the_file_is_read_as_docker_reads_it() -> None:
    text = "\ufeff# comment\n\n /abs/path/ \n!  keep/../kept \n a/./b\r\n#x\n /\n"
    assert read_ignore_file(text) == ["abs/path", "!kept", "a/b", "/"]


@pytest.mark.parametrize("pattern", ["!", "[", "a[b", "[]a]x[", "a[z-a]", "x\\", "[-]", "[\\"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(DockerfileError):
        Patterns([pattern])


_component = st.text("abc.-_ é", min_size=1, max_size=4).filter(lambda t: t.strip(". ") == t)
_paths = st.lists(_component, min_size=1, max_size=4).map("/".join)


@given(_paths, _paths)
def test_a_literal_pattern_covers_itself_and_what_lies_below(pattern: str, path: str) -> None:
    expected = path == pattern or path.startswith(pattern + "/")
    assert Patterns([pattern]).excludes(path) is expected


@given(st.text("ab*?", min_size=1, max_size=5), _component)
def test_within_one_component_it_is_a_shell_pattern(pattern: str, name: str) -> None:
    assume("**" not in pattern)
    assert Patterns([pattern]).excludes(name) is fnmatch.fnmatchcase(name, pattern)


@given(st.lists(_paths, max_size=4), _paths)
def test_an_exception_at_the_end_always_keeps(patterns: list[str], path: str) -> None:
    assert Patterns([*patterns, "!" + path]).excludes(path) is False


@given(st.text("a*?[]^-\\!/.#", max_size=12), _paths)
def test_every_text_is_a_pattern_or_refused(pattern: str, path: str) -> None:
    try:
        Patterns(read_ignore_file(pattern)).excludes(path)
    except DockerfileError:
        pass
