"""Shells' completion of the commands and their options, as scripts that need no Python once they are written."""

from collections.abc import Mapping
from typing import NamedTuple


class Option(NamedTuple):
    word: str  # --lr
    values: tuple[str, ...]  # all that it takes, where they are few
    takes: bool  # whether a value follows
    help: str


Commands = Mapping[str, tuple[str, list[Option]]]  # a line of help, and the options


def script(shell: str, commands: Commands) -> str:
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _bash(commands: Commands) -> str:
    lines = [
        '# bash completion of ribfast: eval "$(ribfast completion bash)"',
        "_ribfast() {",
        '  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} options=""',
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f"    COMPREPLY=($(compgen -W '{' '.join(commands)} --help --version' -- \"$word\"))",
        "    return",
        "  fi",
        '  case "${COMP_WORDS[1]} $before" in',
    ]
    for name, (_, options) in commands.items():
        for option in options:
            if option.values:
                lines.append(f"    '{name} {option.word}') options='{' '.join(option.values)}' ;;")
            elif option.takes:
                lines.append(f"    '{name} {option.word}') COMPREPLY=($(compgen -f -- \"$word\")); return ;;")
    lines += ["  esac", '  [ -n "$options" ] || case "${COMP_WORDS[1]}" in']
    lines += [
        f"    {name}) options='{' '.join(o.word for o in options)}' ;;" for name, (_, options) in commands.items()
    ]
    lines += [
        "  esac",
        '  COMPREPLY=($(compgen -W "$options" -- "$word"))',
        "}",
        "complete -o filenames -F _ribfast ribfast",
    ]
    return "\n".join(lines) + "\n"


def _zsh(commands: Commands) -> str:
    """bash's, which zsh runs."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash(commands).replace("bash", "zsh", 1).replace(
        "completion bash", "completion zsh", 1
    )


def _fish(commands: Commands) -> str:
    lines = [
        "# fish completion of ribfast: ribfast completion fish | source",
        "complete -c ribfast -n __fish_use_subcommand -f",
    ]
    for name, (text, options) in commands.items():
        lines.append(f"complete -c ribfast -n __fish_use_subcommand -a {name} -d {_quoted(text)}")
        for option in options:
            if not option.word.startswith("--"):
                continue
            takes = f" -x -a {_quoted(' '.join(option.values))}" if option.values else " -r" * option.takes
            lines.append(f"complete -c ribfast -n '__fish_seen_subcommand_from {name}' -l {option.word[2:]}{takes} "
                         f"-d {_quoted(option.help)}")  # fmt: skip
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("%%", "%") + "'"
