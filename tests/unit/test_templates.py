"""`--format`: the subset of Go templates, against what docker prints for the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unionimage.cli.common import human_duration, human_size
from unionimage.cli.template import Template
from unionimage.errors import UserError

VALUE = {
    "ID": "abc",
    "Size": 12,
    "Empty": "",
    "None": None,
    "Yes": True,
    "List": ["a", "b"],
    "Rows": {"a/b": [{"Port": "80"}]},
    "Map": {"x": 1, "y": {"z": [1]}},
}


@pytest.mark.parametrize(
    ("template", "output"),
    [
        ("plain", "plain"),
        ("{{.ID}}-{{.Size}}", "abc-12"),
        ("{{.Map}} {{.List}} {{.None}} {{.Yes}}", "map[x:1 y:map[z:[1]]] [a b] <no value> true"),
        ("{{json .Map}}", '{"x":1,"y":{"z":[1]}}'),
        ("{{.Map.y.z}}", "[1]"),
        ('{{index .Map.y.z 0}}{{index .List 1}}{{index .Map "x"}}', "1b1"),
        ('{{(index .Map "y").z}}{{(index (index .Rows "a/b") 0).Port}}', "[1]80"),
        ("{{range $k, $v := .Rows}}{{$k}}->{{(index $v 0).Port}}{{end}}", "a/b->80"),
        ("{{print (len .List) .ID}}", "2 abc"),
        ("{{range .List}}<{{.}}>{{end}}", "<a><b>"),
        ("{{range $i, $v := .List}}{{$i}}={{$v}} {{end}}", "0=a 1=b "),
        ("{{range $k, $v := .Map}}{{$k}} {{end}}", "x y "),
        ("{{range .Empty}}x{{else}}none{{end}}", "none"),
        ("{{if .Yes}}y{{else}}n{{end}}{{if .Empty}}y{{else if .ID}}e{{end}}", "ye"),
        ("{{with .Map.y}}{{.z}}{{end}}", "[1]"),
        ('{{if and .Yes (eq .ID "abc" "x")}}both{{end}}', "both"),
        ("{{if not (or .Empty .None)}}neither{{end}}", "neither"),
        ('{{upper .ID | printf "%5s|%q" .Size}}', '   12|"ABC"'),
        ('{{join .List ", "}} {{len .List}} {{title .ID}}', "a, b 2 Abc"),
        ('{{split "a/b" "/"}}', "[a b]"),
        ("a {{- .ID -}} b", "aabcb"),
        ("{{/* a comment */}}x", "x"),
        ("{{$x := .ID}}{{$x}}{{$.Size}}", "abc12"),
        ("{{println .ID 1}}", "abc 1\n"),
        ("{{if gt .Size 5}}big{{end}}{{slice .ID 1 2}}", "bigb"),
        ("{{`raw`}}", "raw"),
    ],
)
def test_what_templates_print(template: str, output: str) -> None:
    assert Template(template).render(VALUE) == output


MISTAKES = """{{.Nope}}
{{.ID.x}}
{{
{{}}
{{if .ID}}
{{end}}
{{nope .ID}}
{{$x}}
{{define "x"}}
{{range .ID}}{{end}}
{{index .List 9}}
{{(.ID}}
{{.ID | .ID}}
{{printf "%d" .ID}}
{{len .Size}}
{{.ID !}}"""


@pytest.mark.parametrize("template", MISTAKES.splitlines())
def test_mistakes_in_templates_are_told(template: str) -> None:
    with pytest.raises(UserError, match="template"):
        Template(template).render(VALUE)


@given(st.text(alphabet='{}.|$ IDifendrangejson()"`:=-/*', max_size=40))
def test_no_template_crashes(text: str) -> None:
    try:
        Template(text).render(VALUE)
    except UserError:
        pass


def test_sizes_and_durations_are_dockers() -> None:
    sizes = {
        0: "0B",
        999: "999B",
        1000: "1kB",
        1024: "1.02kB",
        187_800_000: "188MB",
        1.5e12: "1.5TB",
    }
    assert {size: human_size(size) for size in sizes} == sizes
    durations = {0: "Less than a second", 1: "1 second", 59: "59 seconds", 60: "About a minute"}
    durations |= {
        3600: "About an hour",
        7300: "2 hours",
        86400 * 3: "3 days",
        86400 * 21: "3 weeks",
    }
    durations |= {86400 * 90: "3 months", 86400 * 800: "2 years"}
    assert {seconds: human_duration(seconds) for seconds in durations} == durations
