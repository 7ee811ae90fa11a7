"""`smezo completion SHELL`: let TAB complete verbs, groups, settings, runs and files.

The scripts ask `smezo completion query LINE` for the words that may end the line.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from smezo_cli.cli.flags import shows_help
from smezo_cli.cli.ls import GROUPS, files_of
from smezo_cli.config.searchpath import SearchPath, of_line
from smezo_cli.errors import UserError, near

USAGE = """\
smezo completion SHELL       a script that makes TAB complete smezo; SHELL is bash, zsh or fish

  bash    eval "$(smezo completion bash)"       in ~/.bashrc
  zsh     eval "$(smezo completion zsh)"        in ~/.zshrc, below compinit
  fish    smezo completion fish | source        in ~/.config/fish/config.fish
"""

# bash splits words at =, so what stands before it must not be offered again.
_BASH = """\
_smezo_complete() {
  local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n' word drop=""
  word="${line##* }"
  case "$COMP_WORDBREAKS" in *=*) case "$word" in *=*) drop="${word%"${word##*=}"}" ;; esac ;; esac
  COMPREPLY=($(smezo completion query "$line" 2>/dev/null))
  COMPREPLY=("${COMPREPLY[@]#"$drop"}")
}
complete -o nospace -o default -F _smezo_complete smezo
"""
_SCRIPTS = {
    "bash": _BASH,
    "zsh": "autoload -Uz bashcompinit && bashcompinit\n" + _BASH,
    "fish": "complete -c smezo -f -a '(smezo completion query (commandline -cp))'\n",
}
_FLAGS = {
    "train": ("--multirun", "--cfg", "--info", "--config-dir", "--help"),
    "plan": ("--memory", "--tokens", "--bench", "--json", "--config-dir", "--help"),
    "choose": (
        *("--memory", "--tokens", "--hours", "--bench", "--json", "--config-dir", "--help"),
    ),
    "runs": ("--mean", "--best", "--by", "--compare", "--runs-dir", "--sort", "--json", "--help"),
    "table": (
        *("--run", "--commands", "--row", "--column", "--less", "--format"),
        *("--runs-dir", "--collect", "--results", "--help"),
    ),
    "plot": ("--x", "--y", "--row", "--column", "--out", "--runs-dir", "--results", "--help"),
    "report": ("--out", "--runs-dir", "--help"),
    "eval": ("--split", "--base", "--step", "--out", "--help"),
    "predict": ("--field", "--out", "--part", "--help"),
    "export": ("--step", "--delta", "--adapter", "--lm-eval", "--help"),
    "replay": ("--step", "--split", "--out", "--help"),
    "bench": ("--rounds", "--only", "--grow", "--json", "--config-dir", "--help"),
    "ls": ("--config-dir", "--help"),
    "show": ("--config-dir", "--help"),
    "doctor": ("--json", "--no-hub", "--help"),
}


def main(words: Sequence[str], verbs: Sequence[str]) -> int:
    """Print a script, or what may end a line; return the exit code.

    Raises:
        UserError: not a shell that is known.
    """
    if words and words[0] == "query":
        line = " ".join(words[1:])
        for word in dict.fromkeys(_query(line, verbs)):
            print(word)
        return 0
    if shows_help(words or ["--help"], USAGE):
        return 0
    if len(words) > 1 or words[0] not in _SCRIPTS:
        raise UserError(
            f"smezo completion {' '.join(words)}: no such shell{near(words[0], _SCRIPTS)}."
        )
    print(_SCRIPTS[words[0]], end="")
    return 0


def _query(line: str, verbs: Sequence[str]) -> Iterator[str]:
    _, *given = line.split(" ")
    given, search = _without_config_dir(given or [""])
    last, verb = given[-1], given[0]
    if len(given) == 1:
        yield from (f"{v} " for v in verbs if v.startswith(last))
    elif last.startswith("-"):
        yield from (f"{flag} " for flag in _FLAGS.get(verb, ()) if flag.startswith(last))
    elif verb in ("train", "plan", "choose"):
        words = [word for word in given[1:] if not word.startswith("-")] or [""]
        yield from _settings(words, search)
    elif verb == "bench":
        from smezo_cli.cli.bench import KEYS

        yield from (f"{key}=" for key in KEYS if key.startswith(last))
        if last.partition("=")[0].partition(".")[0] in KEYS:
            yield from _settings([last], search)
    elif verb == "runs" and given[-2] == "--by":
        yield from (f"{word} " for word in ("loss", "metric") if word.startswith(last))
    elif verb == "plot" and len(given) == 2:
        from smezo_cli.cli.plot import KINDS

        yield from (f"{kind} " for kind in KINDS if kind.startswith(last))
    elif (verb in ("table", "report") and len(given) == 2) or (verb == "plot" and len(given) == 3):
        from smezo_cli.report.table import names

        yield from (f"{name} " for name in names() if name.startswith(last))
    elif verb in ("eval", "predict", "export", "replay") and len(given) == 2:
        yield from (run for run in _runs() if run.startswith(last))
    elif verb in ("ls", "show") and len(given) == 2:
        groups = (*GROUPS, "run") if verb == "show" else GROUPS
        yield from (f"{group} " for group in groups if group.startswith(last))
    elif verb == "show" and given[1] == "run":
        yield from (run for run in _runs() if run.startswith(last))
    elif verb == "show" and len(given) == 3:
        files = files_of(given[1], search.roots)
        yield from (name for name in sorted(files) if name.startswith(last))


def _without_config_dir(words: list[str]) -> tuple[list[str], SearchPath]:
    """Return the words of a line less --config-dir DIR, and where settings are read from."""
    folder, flags = None, ("--config-dir", "-cd")
    for at, word in enumerate(words[:-1]):
        if word in flags and at + 1 < len(words) - 1:
            folder, words = words[at + 1], words[:at] + words[at + 2 :]
            break
        if word.partition("=")[0] in flags and "=" in word:
            folder, words = word.partition("=")[2], words[:at] + words[at + 1 :]
            break
    return words, of_line(folder, ())


def _settings(words: list[str], search: SearchPath) -> Iterator[str]:
    """Return what Hydra's own completion offers for the last word."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    with search.initialized():
        plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
        yield from plugin._query(config_name="train", line=" ".join(words))


def _runs() -> list[str]:
    return sorted(str(file.parent) for file in Path("runs").glob("*/*/result.json"))
