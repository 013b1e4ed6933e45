"""Shells' completion of the commands and their options, as scripts that need no Python once they are written."""

from collections.abc import Mapping
from typing import NamedTuple


class Option(NamedTuple):
    word: str  # --lr
    values: tuple[str, ...]  # all that it takes, where they are few
    takes: str  # what follows: "" for nothing, "path", "data" (KIND:PATH), "named" (NAME=PATH) or "other"
    help: str


Commands = Mapping[str, tuple[str, list[Option]]]  # a line of help, and the options
KINDS = "folder: voc: coco:"

# bash breaks words at : and =, and replaces what follows the last one; so the word is cut from the line, and of what is
# offered that much is left out again. zsh, which runs this too, does neither.
_BASH = """\
_ribfast() {{
  local line=${{COMP_LINE:0:$COMP_POINT}} word before takes="" options="" head="" cut reply
  word=${{line##*[[:blank:]]}}
  line=${{line%"$word"}}
  line=${{line%"${{line##*[![:blank:]]}}"}}
  before=${{line##*[[:blank:]]}}
  case "$word" in --*=*) before=${{word%%=*}} head=${{word%%=*}}= word=${{word#*=}} ;; esac
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    takes=values options='{commands} --help --version'
  else
    case "${{COMP_WORDS[1]}} $before" in
{takes}
    esac
    [ -n "$takes" ] || case "${{COMP_WORDS[1]}}" in
{options}
    esac
  fi
  case "$takes:$word" in
    data:*:*) head=$head${{word%%:*}}: word=${{word#*:}} takes=folder ;;
    data:*) options='{kinds}' ;;
    named:*=*) head=$head${{word%%=*}}= word=${{word#*=}} takes=path ;;
  esac
  cut=$head$word
  case "$COMP_WORDBREAKS" in
    *:*=* | *=*:*) cut=${{cut%"${{cut##*[:=]}}"}} ;;
    *:*) cut=${{cut%"${{cut##*:}}"}} ;;
    *=*) cut=${{cut%"${{cut##*=}}"}} ;;
    *) cut="" ;;
  esac
  while IFS= read -r reply; do
    reply=$head$reply
    COMPREPLY+=("${{reply#"$cut"}}")
  done < <(case "$takes" in
    path) compgen -f -- "$word" ;;
    folder) compgen -d -- "$word" ;;
    values | data) compgen -W "$options" -- "$word" ;;
  esac)
  if type compopt > /dev/null 2>&1; then
    case "$takes" in path | folder) compopt -o filenames ;; esac
    case "$takes" in data | folder) compopt -o nospace ;; esac
  fi
}}
complete -F _ribfast ribfast
"""


def script(shell: str, commands: Commands) -> str:
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _bash(commands: Commands) -> str:
    takes, known = [], []
    for name, (_, options) in commands.items():
        for option in options:
            if option.values:
                takes.append(f"      '{name} {option.word}') takes=values options='{' '.join(option.values)}' ;;")
            elif option.takes:
                takes.append(f"      '{name} {option.word}') takes={option.takes} ;;")
        known.append(f"      {name}) takes=values options='{' '.join(option.word for option in options)}' ;;")
    lines = {"takes": "\n".join(takes), "options": "\n".join(known), "kinds": KINDS, "commands": " ".join(commands)}
    return '# bash completion of ribfast: eval "$(ribfast completion bash)"\n' + _BASH.format(**lines)


def _zsh(commands: Commands) -> str:
    """bash's, which zsh runs."""
    own = _bash(commands).replace("bash", "zsh", 1).replace("completion bash", "completion zsh", 1)
    return "autoload -U +X bashcompinit && bashcompinit\n" + own.replace("complete -F", "complete -o filenames -F")


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
            words = " ".join(option.values) or KINDS * (option.takes == "data")
            takes = " -x" if option.values or option.takes == "other" else " -r" * bool(option.takes)
            takes += f" -a {_quoted(words)}" * bool(words)
            lines.append(f"complete -c ribfast -n '__fish_seen_subcommand_from {name}' -l {option.word[2:]}{takes} "
                         f"-d {_quoted(option.help)}")  # fmt: skip
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("%%", "%") + "'"
