"""`unionfuse completion`: what shells need to complete verbs, options and image names.

The scripts hold the verbs and options as they were when printed, so completing starts no Python;
only names of images and containers are asked for.
"""

from __future__ import annotations

import argparse

from unionimage.cli.verbs import VERBS

EXAMPLE = """
unionfuse completion bash > /etc/bash_completion.d/unionfuse
unionfuse completion zsh > ~/.zfunc/_unionfuse
unionfuse completion fish > ~/.config/fish/completions/unionfuse.fish
"""

_IMAGE_VERBS = [
    "history",
    "inspect",
    "tag",
    "rmi",
    "save",
    "export",
    "diff",
    "which",
    "mount",
    "push",
    "run",
    "create",
    "explore",
    "commit",
]
_NAMES = "unionfuse images --format '{{.Repository}}:{{.Tag}}' 2>/dev/null"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](_options()), end="")
    return 0


def _options() -> dict[str, list[tuple[str, str]]]:
    """verb -> its long options with their help."""
    from unionimage.cli import load_verb, parser_of

    table: dict[str, list[tuple[str, str]]] = {}
    for verb in VERBS:
        parser = parser_of(verb, load_verb(verb))
        table[verb] = [
            (option, (action.help or "").replace("%%", "%"))
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--")
        ]
    return table


def _bash(options: dict[str, list[tuple[str, str]]]) -> str:
    cases = "\n".join(
        f"        {verb}) flags='{' '.join(option for option, _ in flags)}' ;;"
        for verb, flags in options.items()
    )
    return f"""# bash completion for unionfuse
_unionfuse() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} verb= flags= position
    for ((position = 1; position < COMP_CWORD; position++)); do
        case ${{COMP_WORDS[position]}} in
        --root) ((position++)) ;;
        -*) ;;
        *) verb=${{COMP_WORDS[position]}}; break ;;
        esac
    done
    if [ -z "$verb" ]; then
        COMPREPLY=($(compgen -W '{" ".join(options)} --root --help' -- "$word"))
        return
    fi
    case $verb in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
        return
    fi
    case $verb in
    {"|".join(sorted(_IMAGE_VERBS))})
        COMPREPLY=($(compgen -W "$({_NAMES})" -- "$word"))
        __ltrim_colon_completions "$word" 2>/dev/null ;;
    esac
}}
complete -o default -F _unionfuse unionfuse
"""


def _zsh(options: dict[str, list[tuple[str, str]]]) -> str:

    def quoted(text: str) -> str:
        return text.replace("'", "'\\''").replace("[", "(").replace("]", ")").replace(":", "\\:")

    verbs = "\n".join(f"        '{verb}:{quoted(VERBS[verb][1])}'" for verb in options)
    cases = "\n".join(
        f"    {verb}) _arguments "
        + " ".join(f"'{option}[{quoted(text)}]'" for option, text in flags)
        + f" '*:name:{'_unionfuse_images' if verb in _IMAGE_VERBS else '_files'}' ;;"
        for verb, flags in options.items()
    )
    return f"""#compdef unionfuse
_unionfuse_images() {{
    local -a names
    names=(${{(f)"$({_NAMES})"}})
    compadd -a names
}}
_unionfuse() {{
    local -a verbs
    verbs=(
{verbs}
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    local verb=$words[2]
    shift words; (( CURRENT-- ))
    case $verb in
{cases}
    esac
}}
_unionfuse "$@"
"""


def _fish(options: dict[str, list[tuple[str, str]]]) -> str:

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["# fish completion for unionfuse"]
    for verb, flags in options.items():
        text = quoted(VERBS[verb][1])
        lines.append(f"complete -c unionfuse -n __fish_use_subcommand -f -a {verb} -d {text}")
        seen = f"-n '__fish_seen_subcommand_from {verb}'"
        lines += [
            f"complete -c unionfuse {seen} -l {option[2:]} -d {quoted(text)}"
            for option, text in flags
        ]
        if verb in _IMAGE_VERBS:
            lines.append(f'complete -c unionfuse {seen} -a "({_NAMES})"')
    return "\n".join(lines) + "\n"
