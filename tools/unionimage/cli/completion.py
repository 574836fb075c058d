"""`unionfuse completion`: what shells need to complete verbs, options and names.

The scripts hold the verbs and options as they were when printed, so completing starts no Python;
only names of images, containers, volumes and networks are asked for.
"""

from __future__ import annotations

import argparse

from unionimage.cli.verbs import ALIASES, VERBS

EXAMPLE = """
unionfuse completion bash > /etc/bash_completion.d/unionfuse
unionfuse completion zsh > ~/.zfunc/_unionfuse
unionfuse completion fish > ~/.config/fish/completions/unionfuse.fish
"""

# What a positional argument's metavar has in it -> the command that prints the names.
_NAMES = {
    "IMAGE": "unionfuse images --format '{{.Repository}}:{{.Tag}}'",
    "CONTAINER": "unionfuse ps -a --format '{{.Names}}'",
    "VOLUME": "unionfuse volume ls -q",
    "NETWORK": "unionfuse network ls --format '{{.Name}}'",
}


class _Entry:
    """What may follow a verb, or a verb and its action.

    Attributes:
        options: its long options with their help.
        actions: of a group, with their help.
        kinds: keys of _NAMES that its arguments may be.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.options: list[tuple[str, str]] = []
        self.actions: list[tuple[str, str]] = []
        self.kinds: list[str] = []


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](_entries()), end="")
    return 0


def _entries() -> dict[tuple[str, ...], _Entry]:
    """`(verb,)` and `(verb, action)` -> what may follow."""
    from unionimage.cli import load_verb, parser_of

    parsers = {verb: parser_of(verb, load_verb(verb)) for verb in VERBS}
    table: dict[tuple[str, ...], _Entry] = {}
    for verb, parser in parsers.items():
        table[verb,] = entry = _entry(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, below in action.choices.items():
                    target = ALIASES.get((verb, name))
                    table[verb, name] = _entry(parsers[target[0]] if target else below)
                    entry.actions.append((name, table[verb, name].text))
    return table


def _entry(parser: argparse.ArgumentParser) -> _Entry:
    entry = _Entry((parser.description or "").removesuffix("."))
    for action in parser._actions:
        text = (action.help or "").replace("%%", "%")
        entry.options += [(one, text) for one in action.option_strings if one.startswith("--")]
        if not action.option_strings:
            entry.kinds += [kind for kind in _NAMES if kind in str(action.metavar)]
    return entry


def _bash(entries: dict[tuple[str, ...], _Entry]) -> str:
    def words(told: list[tuple[str, str]]) -> str:
        return " ".join(word for word, _ in told)

    # Two words come before one: the first pattern that fits is taken.
    cases = "\n".join(
        f"    '{' '.join(key)} '*) flags='{words(entry.options)}'"
        f" actions='{words(entry.actions)}' kinds='{' '.join(entry.kinds)}' ;;"
        for key, entry in sorted(entries.items(), key=lambda one: -len(one[0]))
    )
    names = "\n".join(
        f"        {kind}) {command} 2>/dev/null ;;" for kind, command in _NAMES.items()
    )
    return f"""# bash completion for unionfuse
_unionfuse_names() {{
    local kind
    for kind; do
        case $kind in
{names}
        esac
    done
}}
_unionfuse() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} typed= flags= actions= kinds= position
    # A name is cut at its colons into several words.
    if declare -F _get_comp_words_by_ref >/dev/null; then _get_comp_words_by_ref -n : -c word; fi
    for ((position = 1; position < COMP_CWORD; position++)); do
        case ${{COMP_WORDS[position]}} in
        --root) ((position++)) ;;
        -*) ;;
        *) typed+="${{COMP_WORDS[position]}} " ;;
        esac
    done
    case $typed in
    '') actions='{" ".join(VERBS)}' flags='--root --help --version' ;;
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    elif [ -n "$actions" ]; then
        COMPREPLY=($(compgen -W "$actions" -- "$word"))
    elif [ -n "$kinds" ]; then
        COMPREPLY=($(compgen -W "$(_unionfuse_names $kinds)" -- "$word"))
        __ltrim_colon_completions "$word" 2>/dev/null
    fi
}}
complete -o default -F _unionfuse unionfuse
"""


def _zsh(entries: dict[tuple[str, ...], _Entry]) -> str:
    def quoted(text: str) -> str:
        return text.replace("'", "'\\''").replace("[", "(").replace("]", ")").replace(":", "\\:")

    def described(told: list[tuple[str, str]]) -> str:
        return " ".join(f"'{word}:{quoted(text)}'" for word, text in told)

    def arguments(entry: _Entry) -> str:
        options = " ".join(f"'{option}[{quoted(text)}]'" for option, text in entry.options)
        names = f"{{_unionfuse_names {' '.join(entry.kinds)}}}" if entry.kinds else "_files"
        return f"_arguments {options} '*:name:{names}'"

    cases = []
    for key, entry in sorted(entries.items(), key=lambda one: -len(one[0])):
        if len(key) == 1 and entry.actions:
            cases.append(f"    {key[0]}' '*) told=({described(entry.actions)}); shown=action ;;")
        else:
            cases.append(
                f"    '{' '.join(key)} '*) shift {len(key)} words;"
                f" (( CURRENT -= {len(key)} )); {arguments(entry)}; return ;;"
            )
    verbs = described([(verb, text) for verb, (_, text) in VERBS.items()])
    names = "\n".join(
        f'        {kind}) names+=(${{(f)"$({command} 2>/dev/null)"}}) ;;'
        for kind, command in _NAMES.items()
    )
    newline = "\n"
    return f"""#compdef unionfuse
_unionfuse_names() {{
    local kind
    local -a names
    for kind in "$@"; do
        case $kind in
{names}
        esac
    done
    compadd -a names
}}
_unionfuse() {{
    local -a told
    local shown
    local typed="${{words[2,CURRENT-1]}} "
    case $typed in
    ' ') told=({verbs}); shown=verb ;;
{newline.join(cases)}
    esac
    (( $#told )) && _describe $shown told
}}
_unionfuse "$@"
"""


def _fish(entries: dict[tuple[str, ...], _Entry]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["# fish completion for unionfuse"]
    for verb, (_, text) in VERBS.items():
        lines.append(
            f"complete -c unionfuse -n __fish_use_subcommand -f -a {verb} -d {quoted(text)}"
        )
    groups = " ".join(key[0] for key, entry in entries.items() if entry.actions)
    for key, entry in entries.items():
        condition = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in key)
        if len(key) == 1 and not entry.actions:
            condition += f"; and not __fish_seen_subcommand_from {groups}"
        begin = f"complete -c unionfuse -n {quoted(condition)}"
        lines += [f"{begin} -l {option[2:]} -d {quoted(text)}" for option, text in entry.options]
        if entry.actions:
            known = " ".join(word for word, _ in entry.actions)
            alone = f"{condition}; and not __fish_seen_subcommand_from {known}"
            lines += [
                f"complete -c unionfuse -n {quoted(alone)} -f -a {word} -d {quoted(text)}"
                for word, text in entry.actions
            ]
        lines += [f'{begin} -f -a "({_NAMES[kind]} 2>/dev/null)"' for kind in entry.kinds]
    return "\n".join(lines) + "\n"
