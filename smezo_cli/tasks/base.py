"""Define a task: prompts, rows, and the three splits that are cut from the rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

from smezo_cli.errors import UserError
from smezo_cli.tasks.templates import (
    LETTER,
    LETTERS,
    MASK,
    NUMBER,
    OPTION,
    check_template,
    fields_of,
    fill,
    places,
)


class Row(NamedTuple):
    """Hold one example.

    Attributes:
        fields: its texts by name.
        label: index of the right candidate (the one trained on); -1 where it is not known.
        id: its place in the source.
        options: in a choice task the row's own candidates, else ().
        right: in a choice task all candidates that count as right, the label among them.
        answers: in a generation task the reference answers; the first is trained on.
        part: in a mixture the name of the part that it is of.
    """

    fields: Mapping[str, str]
    label: int
    id: str
    options: tuple[str, ...] = ()
    right: frozenset[int] = frozenset()
    answers: tuple[str, ...] = ()
    part: str = ""


@dataclass(frozen=True)
class Prompt:
    """Write rows as text: a template with `{field}` places, and what follows it.

    See `smezo_cli.tasks.templates`.

    Attributes:
        template: the context; with a `{mask}` place it is for masked language models.
        labels: in a classification task the label words by class index.
        option: in a choice task how an option is written behind the context; beside the fields it
            has places for `{option}`, its `{number}` from 1 and its `{letter}` from A.
        head: what stands before every context: demonstrations, and what parts them from it.
        sfc: in a calibrated prompt the template of the domain-conditional prompt; see `base`.
        part: in a mixture the name of the part whose rows it writes.
    """

    template: str
    labels: tuple[str, ...] = ()
    option: str = "{option}"
    head: str = ""
    sfc: str | None = None
    part: str = ""

    @property
    def is_masked(self) -> bool:
        """Say whether it is for masked language models."""
        return any(name == MASK for _, name, _ in places(self.template))

    @property
    def base(self) -> "Prompt | None":
        """Return the prompt whose scores are taken off those of this one; None if it has none.

        It says of the row only what all rows of the domain have in common, so that its scores are
        those which the candidates owe to their wording alone (surface form competition, Holtzman et
        al., 2021, arXiv 2104.08315; MeZO's `--sfc`). No demonstrations stand before it.
        """
        return None if self.sfc is None else BasePrompt(self.sfc, self.labels, self.option)

    def context(self, fields: Mapping[str, str]) -> str:
        """Fill in the template; blanks are stripped at both ends, and newlines where a text begins.

        So MeZO does it: a newline at the end stays, and one behind demonstrations, too. In a masked
        prompt, where only blanks are stripped, `fields` may hold the mask token as `mask`; else
        `{mask}` stays there.
        """
        text = fill(self.template, fields).strip(" ")
        return self.head + text if self.head or self.is_masked else text.lstrip()

    def candidates(self, row: Row) -> tuple[str, ...]:
        """Return context and candidate for each candidate of the row, or for the first answer.

        One blank stands between them unless the context ends in a space or newline. In a masked
        prompt the label words stand in the place of the mask.
        """
        if self.is_masked:
            return tuple(self.context({**row.fields, MASK: word}) for word in self.labels)
        context = self.context(row.fields)
        if row.answers:
            # Not stripped: the newline behind an answer is what ends it.
            return (context + f" {row.answers[0]}\n",)
        words = [
            fill(self.option, {**option_fields(text, k), **row.fields, OPTION: text})
            for k, text in enumerate(row.options)
        ]
        blank = "" if context[-1:].isspace() else " "
        return tuple((context + blank + word).strip(" ") for word in words or self.labels)


@dataclass(frozen=True)
class BasePrompt(Prompt):
    """Write a domain-conditional prompt; it may be empty, and show nothing of the row."""

    def context(self, fields: Mapping[str, str]) -> str:
        """Fill in the template; blanks alone are stripped at both ends, as in MeZO."""
        return fill(self.template, fields).strip(" ")


def option_fields(text: str, index: int) -> dict[str, str]:
    """Return what the template of an option can show of the option at `index` (from 0).

    Options behind the last letter have none; :func:`check_letters` refuses to show it.
    """
    shown = {OPTION: text, NUMBER: str(index + 1)}
    return shown | {LETTER: LETTERS[index]} if index < len(LETTERS) else shown


def check_letters(prompt: Prompt, rows: Iterable[Row]) -> None:
    """Raise UserError if options show their letters, and a row has more options than letters."""
    if LETTER not in fields_of(prompt.option):
        return
    for row in rows:
        if len(row.options) > len(LETTERS) and LETTER not in row.fields:
            raise UserError(
                f"task.option_template={prompt.option!r} shows letters, which end at "
                f"{LETTERS[-1]}, and row {row.id} has {len(row.options)} options: show "
                "{number} instead."
            )


@dataclass(frozen=True)
class Task:
    """Hold a task whose rows were read and cut.

    Attributes:
        name: of the task node.
        kind: one of `KINDS`; what the model is asked and how it is scored.
        prompts: the ones to choose from.
        masked: those for masked language models.
        train, dev, test: the rows.
        classes: names of the classes of a classification task, else ().
        source: in one line, where the rows are from and what of them was left out.
        fingerprint: hex digest or commit of the data; "" where neither is known.
        notes: what somebody who reads the metrics must know of the rows, each in one line.
        parts: of a mixture its tasks by name; its prompts and rows are theirs, one after the other.
        weights: of a mixture how much the loss of each part counts; they add up to 1.
    """

    name: str
    kind: str
    prompts: tuple[Prompt, ...]
    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    classes: tuple[str, ...]
    source: str
    masked: tuple[Prompt, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    parts: Mapping[str, "Task"] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tables:
    """Hold what a reader returns: all rows before any cut, with the texts named in `fields`.

    `test` is empty where the test rows are to be cut from the train rows; `groups` then has, by the
    id of a train row, the text that it shares with others, if rows do: such rows are not parted.
    """

    train: Sequence[Row]
    test: Sequence[Row]
    fields: tuple[str, ...]
    classes: tuple[str, ...]
    source: str
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)


def fingerprint(rows: Sequence[Row]) -> str:
    """Return twelve hex digits of rows in their order: equal for equal ids, texts and labels.

    Of a row in a mixture the id says the part.
    """
    # As json.dumps writes a list of them with sorted keys, which takes three times as long.
    digest, quoted = hashlib.sha256(), json.encoder.encode_basestring_ascii
    for text, label, name, options, right, answers, _ in rows:
        fields = ", ".join([f"{quoted(k)}: {quoted(v)}" for k, v in sorted(text.items())])
        lists = "[], [], []"
        if options or right or answers:
            parts = map(quoted, options), map(str, sorted(right)), map(quoted, answers)
            lists = ", ".join(f"[{', '.join(part)}]" for part in parts)
        digest.update(f"[{quoted(name)}, {label}, {{{fields}}}, {lists}]".encode())
    return digest.hexdigest()[:12]


def permute(rows: Sequence[Row], data_seed: int) -> list[Row]:
    """Order rows by a hash of `data_seed` and their ids: equal on any machine and input order."""
    return sorted(rows, key=lambda row: _key(data_seed, row.id))


def _key(data_seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{data_seed}/{name}".encode()).digest()


def _order(tables: Tables, data_seed: int) -> list[Row]:
    """Return the permuted train rows; of groups, which are permuted, the rows stay together."""
    rows = permute(tables.train, data_seed)
    if tables.groups:
        rows.sort(key=lambda row: _key(data_seed, tables.groups[row.id]))
    return rows


def _border(
    order: Sequence[Row], groups: Mapping[str, str], split: int, num_dev: int, num_test: int
) -> int:
    """Return where test rows begin so that none shares a group with train or dev; 0: nowhere.

    That is at `split`, or as near behind it as leaves `num_test` rows; else before it, where a row
    is left to train on; else behind it, with fewer test rows.
    """
    starts = [i for i in range(1, len(order)) if groups[order[i].id] != groups[order[i - 1].id]]
    behind = [i for i in starts if i >= split]
    enough = [i for i in behind if len(order) - i >= num_test]
    before = [i for i in starts if num_dev < i < split]
    return (enough or before[::-1] or behind or [0])[0]


def cut(
    tables: Tables, cfg: Mapping[str, Any], data_seed: int
) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]:
    """Return train, dev and test rows by `num_train`, `num_dev`, `num_test`; null: all the rest.

    As in MeZO, dev is the end of the first `num_train + num_dev` permuted train rows, `num_test`
    is an upper limit, and so is `num_train` where the rows are fewer: dev is served first. With
    `test_from: train` the test rows are those behind train and dev, and are served first of all;
    rows that share a text, such as the questions on a passage, are all among them or none is.

    With `num_per_class` k, `num_train` and `num_dev` play no part: of each class the first k
    permuted train rows are for train and the next k for dev, or as many as there are, as in MeZO's
    experiments with RoBERTa (arXiv 2305.17333, section 3.1).

    Raises:
        UserError: nothing would be left for one of them; a class without a row.
    """
    for key in ("num_train", "num_dev", "num_test", "num_per_class"):
        value = cfg.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"task.{key}={value} is no row count; give an integer from 1, or null.")
    num_train, num_dev, num_test = cfg["num_train"], cfg["num_dev"], cfg["num_test"]
    from_train = cfg.get("test_from", "test") == "train"
    if cfg.get("num_per_class") is not None:
        return _cut_by_class(tables, cfg, data_seed)
    asked = {"num_train": num_train, "num_dev": num_dev}
    if from_train:
        asked["num_test"] = num_test
    unlimited = [f"task.{key}" for key, value in asked.items() if value is None]
    if len(unlimited) > 1:
        raise UserError(
            f"{' and '.join(unlimited)} are null, all rows that are left; give "
            f"{'one of them' if len(unlimited) == 2 else 'two of them'} a number."
        )
    have = len(tables.train)
    left = have - sum(value for key, value in asked.items() if key != "num_train" and value)
    if num_train is None or left < num_train:
        num_train = left
    elif num_dev is None:
        num_dev = left - num_train
    elif from_train and num_test is None:
        num_test = left - num_train
    if num_train < 1 or num_dev is None or num_dev < 1 or (from_train and not num_test):
        shown = [f"task.{key}={'null' if value is None else value}" for key, value in asked.items()]
        raise UserError(
            f"{', '.join(shown[:-1])} and {shown[-1]} do not fit: task {cfg['name']} has {have} "
            f"rows for the {'two' if len(asked) == 2 else 'three'} together, at least 1 for each."
        )
    order = _order(tables, data_seed)
    split = behind = num_train + num_dev
    if from_train and tables.groups:
        behind = _border(order, tables.groups, split, num_dev, cfg["num_test"] or 1)
        if not behind:
            texts = len(set(tables.groups.values()))
            raise UserError(
                f"task.test_from=train: rows of one passage are not parted, and the {have} rows of "
                f"task {cfg['name']} are of {texts}, too few for task.num_dev={num_dev} and test "
                "rows: give rows of more passages, a lower task.num_dev, or a test file."
            )
        split = min(split, behind)
        num_train = split - num_dev
    rest = order[behind:] if from_train else permute(tables.test, data_seed)
    return tuple(order[:num_train]), tuple(order[num_train:split]), tuple(rest[:num_test])


def _cut_by_class(
    tables: Tables, cfg: Mapping[str, Any], data_seed: int
) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]:
    key = f"task.num_per_class={cfg['num_per_class']}"
    size: int = cfg["num_per_class"]
    for index, name in enumerate(tables.classes):
        if not any(row.label == index for row in tables.train):
            raise UserError(
                f"{key}: task {cfg['name']} has no train rows of class {name}; give rows of every "
                "class, or task.num_per_class=null."
            )
    seen: Counter[int] = Counter()
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in _order(tables, data_seed):
        parts[min(seen[row.label] // size, 2)].append(row)
        seen[row.label] += 1
    train, dev, rest = parts
    if not dev:
        raise UserError(
            f"{key} leaves no rows for dev, which gets as many of each class: task {cfg['name']} "
            f"has {max(seen.values())} rows of a class at most; lower it."
        )
    if cfg.get("test_from", "test") == "train":
        taken = {tables.groups.get(row.id) for row in (*train, *dev)} - {None}
        test = [row for row in rest if tables.groups.get(row.id) not in taken]
    else:
        test = permute(tables.test, data_seed)
    if not test:
        raise UserError(
            f"{key} leaves no rows for test: task {cfg['name']} has {len(tables.train)} rows for "
            "train, dev and test; lower it."
        )
    return tuple(train), tuple(dev), tuple(test[: cfg["num_test"]])


def one_class(labels: Sequence[int]) -> bool:
    """Say whether all labels are the same, so that nothing can be ranked or calibrated."""
    return len(set(labels)) == 1


def lacking(
    train: Sequence[Row], dev: Sequence[Row], classes: Sequence[str], num_per_class: int
) -> list[str]:
    """Return a line for each class with fewer than `num_per_class` train or dev rows."""
    counts = [Counter(row.label for row in rows) for rows in (train, dev)]
    return [
        f"{num_per_class} rows of class {name} asked for, {counts[0][index]} there for train and "
        f"{counts[1][index]} for dev"
        for index, name in enumerate(classes)
        if counts[1][index] < num_per_class
    ]


def _listed(cfg: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    nodes = cfg.get(key) or ()
    if not isinstance(nodes, list | tuple) or not all(
        isinstance(node, Mapping) and isinstance(node.get("template"), str) for node in nodes
    ):
        raise UserError(
            f'task.{key} must be a list of mappings like {{template: "{{text}} It was", labels: '
            "[bad, good]}."
        )
    return nodes


def prompts_of(cfg: Mapping[str, Any], tables: Tables) -> tuple[Prompt, ...]:
    """Return the prompts that a task node lists, or the one that `prompt`, `labels` ask for.

    Those of `masked` come last; `prompt` takes their place too if it is a template.

    Raises:
        UserError: a prompt that does not fit the fields and classes of the rows.
    """
    listed, masked = (
        [
            Prompt(
                node["template"],
                _words(node["labels"]) if "labels" in node else (),
                node.get("option", Prompt.option),
                sfc=node.get("sfc"),
            )
            for node in _listed(cfg, key)
        ]
        for key in ("prompts", "masked")
    )
    choice, words = cfg["prompt"], cfg.get("labels")
    if type(choice) is int:
        if not 0 <= choice < len(listed):
            raise UserError(
                f"task.prompt={choice}, but the prompts of task {cfg['name']} are 0 to "
                f"{len(listed) - 1}; give one of these numbers or a template in quotes."
                if listed
                else f"task.prompt={choice}: task {cfg['name']} lists no prompts to choose from; "
                "give a template in quotes."
            )
        listed = [listed[choice]]
    elif choice is not None:
        # The words of another template seldom fit, but with only one list there is no doubt.
        if words is None and len({prompt.labels for prompt in listed}) > 1:
            raise UserError(
                "task.prompt gives a template without label words; add task.labels, "
                f"e.g. 'task.labels=[{','.join(listed[0].labels)}]'."
            )
        like = listed[0] if listed else Prompt("")
        # A shell hands on \\n as two characters.
        template = str(choice).replace("\\n", "\n")
        listed, masked = [replace(like, template=template, sfc=None)], []
    if words is not None:
        if len(listed) > 1:
            raise UserError(
                f"task.labels is for one prompt and task {cfg['name']} has {len(listed)}; "
                "give task.prompt too (a number or a template in quotes)."
            )
        given = _words(words)
        listed, masked = ([replace(p, labels=given) for p in ps] for ps in (listed, masked))
    if (option := cfg.get("option_template")) is not None:
        option = str(option).replace("\\n", "\n")
        listed = [replace(prompt, option=option) for prompt in listed]
    prompts = [_calibrated(prompt, cfg) for prompt in (*listed, *masked)]
    for prompt in prompts:
        _check(prompt, tables, cfg["kind"])
    return tuple(prompts)


def _calibrated(prompt: Prompt, cfg: Mapping[str, Any]) -> Prompt:
    """Return the prompt with the domain-conditional prompt that `sfc` and `sfc_prompt` give."""
    if not cfg.get("sfc"):
        return replace(prompt, sfc=None)
    if (given := cfg.get("sfc_prompt")) is None:
        return prompt
    given = str(given).replace("\\n", "\n")
    # The other prompts are for the other family of models, and are not asked.
    is_alike = Prompt(given).is_masked == prompt.is_masked
    return replace(prompt, sfc=given if is_alike else None)


def _words(words: Any) -> tuple[str, ...]:
    """Return label words by class index, from `[no, yes]` or `{0: no, 1: yes}`."""
    given = words
    if isinstance(words, Mapping):
        by_index = {str(index): word for index, word in words.items()}
        words = [by_index.get(str(index)) for index in range(len(by_index))]
    if isinstance(words, list):
        words = [str(word) if type(word) is int else word for word in words]
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
        raise UserError(
            f"task.labels={given} gives no word for each class; write it as [terrible, great] or "
            "{0: terrible, 1: great}, with quotes around yes, no, true and false."
        )
    return tuple(words)


def _check(prompt: Prompt, tables: Tables, kind: str) -> None:
    if prompt.sfc is not None:
        allowed = (*tables.fields, MASK) if prompt.is_masked else tables.fields
        check_template(prompt.sfc, allowed, key="task.sfc_prompt", may_be_plain=True)
    if kind != "classification":
        check_template(prompt.template, tables.fields)
        if kind == "choice":
            own = [name for name in (NUMBER, LETTER) if name not in tables.fields]
            check_template(
                prompt.option,
                (*tables.fields, OPTION, *own),
                key="task.option_template",
                needed=(OPTION, *own),
            )
            check_letters(prompt, chain(tables.train, tables.test))
        return
    check_template(prompt.template, (*tables.fields, MASK))
    if not len(prompt.labels) == len(set(prompt.labels)) == len(tables.classes):
        raise UserError(
            f"task.labels={list(prompt.labels)}: one label word for each of the "
            f"{len(tables.classes)} classes is needed, all different."
        )
