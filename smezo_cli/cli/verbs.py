"""Hand the line of the `smezo` command to the file of its verb.

Nothing heavy is imported here, and nothing at all before `main` has made the process ready.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in typing, which takes a while to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

USAGE = """\
smezo: zeroth-order fine-tuning of language models

  smezo train [KEY=VALUE ...]     train and test; smezo train --help lists the settings
  smezo plan [KEY=VALUE ...]      the memory that such a run will need, and whether it fits
  smezo choose [KEY=VALUE ...]    the methods that fit, best first, each with its command
  smezo runs [KEY=VALUE ...]      the runs so far: list, filter, merge over seeds, compare
  smezo table [ID]                the papers' tables: ours beside theirs, and what fills them
  smezo plot KIND                 figures as the papers have them, from runs or from a table
  smezo report [KEY=VALUE ...]    one HTML file to look at: results, curves, costs, commands
  smezo eval RUN                  score a trained run on a split, save every prediction
  smezo predict RUN FILE          predict rows of your own
  smezo export RUN FOLDER         the trained model, as transformers loads it
  smezo replay RUN                the trained weights again, from the base model and the steps alone
  smezo bench [KEY=VALUE ...]     what a step costs here, beside plain forwards and the textbook's
  smezo ls [GROUP]                what there is: tasks, models, methods, experiments, ...
  smezo show GROUP NAME           one of them: what it is, its values and where they come from
                                  (both with --config-dir DIR: your own, which come first)
  smezo doctor                    versions, devices, passes, caches: for a bug report
  smezo completion SHELL          TAB completion for bash, zsh or fish
  smezo --version

smezo VERB --help tells more. Examples:
  smezo train                                          the default run, nothing else needed
  smezo train method=mezo seed=1                       another method, another seed
  smezo train -m method=mezo,sparse_mezo seed=0,1,2    six runs, one after the other
"""

VERBS = (
    *("train", "plan", "choose", "runs", "table", "plot", "report"),
    *("eval", "predict", "export", "replay", "bench"),
    *("ls", "show", "doctor", "completion"),
)


# They load a model by transformers, which reads its own docstrings.
_LOAD_MODELS = ("train", "plan", "choose", "eval", "predict", "export", "replay", "bench")
_PRINT_DATA = ("plan", "choose", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 2 for a mistake of the user, told in one sentence.

    130 where Ctrl-C ended it; a reader that has seen enough (`smezo runs | head`) is no mistake.

    Args:
        argv: the words of the line; None takes those of this process, which is then ours alone.
    """
    if argv is not None:
        return _answer(list(argv))
    from smezo_cli.machine import process

    process.begin()
    return process.end(_answer(sys.argv[1:]))


def _answer(words: list[str]) -> int:
    from smezo_cli.errors import UserError

    try:
        for word in words:
            _check_text(word)
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"smezo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _check_text(word: str) -> None:
    if "\0" in word:
        raise _mistake("a word of the command line holds a zero byte: take it out.")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise _mistake(
            f"{word}: it is not UTF-8, which is what settings are kept in: rename the file or "
            "folder, or reach it by a link with another name."
        ) from None


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    verb, *rest = words
    if verb == "--version":
        from smezo_cli import __version__

        print(f"smezo {__version__}")
        return 0
    if verb in _LOAD_MODELS and "--help" not in rest and "-h" not in rest:
        _check_docstrings()
        from smezo_cli.machine.waiting import beside_data, waiting

        beside_data(verb in _PRINT_DATA)
        if verb != "train":  # it loads them when a run begins, and may print settings alone
            with waiting("loading torch and transformers"):
                run = _main_of(verb)
            return run(rest)
    return _main_of(verb)(rest)


def _main_of(verb: str) -> Callable[[list[str]], int]:
    """Import the file of a verb, and no other; return what runs it."""
    match verb:
        case "train":
            from smezo_cli.train import main as train

            return train
        case "plan":
            from smezo_cli.cli import plan

            return plan.main
        case "choose":
            from smezo_cli.cli import choose

            return choose.main
        case "runs":
            from smezo_cli.cli import runs

            return runs.main
        case "table":
            from smezo_cli.cli import table

            return table.main
        case "plot":
            from smezo_cli.cli import plot

            return plot.main
        case "report":
            from smezo_cli.cli import report

            return report.main
        case "eval":
            from smezo_cli.cli import evaluate

            return evaluate.main
        case "predict":
            from smezo_cli.cli import predict

            return predict.main
        case "export":
            from smezo_cli.cli import export

            return export.main
        case "replay":
            from smezo_cli.cli import replay

            return replay.main
        case "bench":
            from smezo_cli.cli import bench

            return bench.main
        case "ls":
            from smezo_cli.cli import ls

            return ls.main
        case "show":
            from smezo_cli.cli import ls

            return ls.show
        case "doctor":
            from smezo_cli.cli import doctor

            return doctor.main
        case "completion":
            from smezo_cli.cli import completion

            return lambda words: completion.main(words, VERBS)
    from smezo_cli.errors import near

    raise _mistake(f"there is no verb {verb}{near(verb, VERBS)}.")


def _check_docstrings() -> None:
    if sys.flags.optimize > 1:
        raise _mistake(
            "Python was told to drop docstrings (PYTHONOPTIMIZE=2 or python -OO), and transformers "
            "reads its own: unset PYTHONOPTIMIZE, or set it to 1."
        )


def _mistake(text: str) -> Exception:
    from smezo_cli.errors import UserError

    return UserError(text)
