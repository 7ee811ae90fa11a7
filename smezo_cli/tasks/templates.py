"""Fill in prompt templates: `{field}` and `{field|filter|filter}`, any other brace twice.

The filters are those that MeZO's prompts need (arXiv 2305.17333, appendix E, and its code).
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence

from smezo_cli.errors import UserError, near

MASK = "mask"  # the place of the mask token of a masked language model
OPTION = "option"  # in an option's template: the option's text
NUMBER, LETTER = "number", "letter"  # there too: which one it is, 1 or A the first
LETTERS = string.ascii_uppercase  # of options, in their order


def _question(text: str) -> str:
    text = text if text.endswith("?") else f"{text}?"
    return text[:1].upper() + text[1:]


def _uncapital(text: str) -> str:
    return text[:1].lower() + text[1:]


def _lower_first(text: str) -> str:
    first, blank, rest = text.partition(" ")
    return text if first == "I" else first.lower() + blank + rest


# Each gets the text and all fields of the row.
FILTERS: dict[str, Callable[[str, Mapping[str, str]], str]] = {
    "strip": lambda text, _: text.strip(),
    "rstrip": lambda text, _: text.rstrip(),
    "lower": lambda text, _: text.lower(),
    "question": lambda text, _: _question(text),  # is it so -> Is it so?
    "no_period": lambda text, _: text.removesuffix("."),
    "lower_first": lambda text, _: _lower_first(text),  # the first word, unless it is I
    "uncapital": lambda text, _: _uncapital(text),  # the first character
    "less_last": lambda text, _: text[:-1],  # without the last character, which ends a sentence
    "highlights": lambda text, _: text.replace("@highlight\n", "- "),
    "with_option": lambda text, fields: text.replace("@placeholder", fields[OPTION]),
}


def places(template: str) -> Iterator[tuple[str, str | None, tuple[str, ...]]]:
    """Split into (literal text, field behind it or None, its filters).

    Raises:
        ValueError: a brace that is not closed, or a place with `!` or `:`.
    """
    for text, field, form, conversion in string.Formatter().parse(template):
        if form or conversion:
            raise ValueError(f"{{{field}}} has a {'!' if conversion else ':'}")
        name, *filters = (field or "").split("|")
        yield text, None if field is None else name.strip(), tuple(f.strip() for f in filters)


def fields_of(template: str) -> list[str]:
    """Return the names of the fields that a template shows, without the mask's; see `places`."""
    names = [name for _, name, _ in places(template) if name not in (None, MASK)]
    return [name for name in dict.fromkeys(names) if name is not None]


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Fill in the texts; without a text for the mask, `{mask}` stays."""
    # Not str.format: a field's text is data, and a template has no business with attributes.
    parts = []
    for text, name, filters in places(template):
        parts.append(text)
        if name is not None:
            value = fields.get(name, "{mask}") if name == MASK else fields[name]
            for filter_name in filters:
                value = FILTERS[filter_name](value, fields)
            parts.append(value)
    return "".join(parts)


def check_template(
    template: str,
    allowed: Sequence[str],
    *,
    key: str = "task.prompt",
    needed: Sequence[str] = (),
    may_be_plain: bool = False,
) -> None:
    """Raise UserError for a template that does not fit the rows or shows none of `needed`.

    With `may_be_plain` it need not show any.

    Raises:
        UserError: naming the template, the field or filter, and what there is.
    """
    shown = f"{key}={template!r}"
    known = [f"{{{field}}}" for field in allowed if field != MASK]
    names = ", ".join(known)
    try:
        parts = list(places(template))
    except ValueError as error:
        raise UserError(
            f"{shown}: {error}; write a place as {names}, which is no field with ! or :, and any "
            "other brace twice."
        ) from error
    used = [(name, filters) for _, name, filters in parts if name is not None]
    for name, filters in used:
        if name not in allowed:
            hint = near(f"{{{name}}}", known)
            raise UserError(f"{shown}: {{{name}}} is no field of the rows{hint}.")
        for filter_name in filters:
            if filter_name not in FILTERS:
                raise UserError(
                    f"{shown}: there is no filter {filter_name}{near(filter_name, FILTERS)}."
                )
            if filter_name == "with_option" and OPTION not in allowed:
                raise UserError(
                    f"{shown}: the filter with_option is for task.option_template, where the "
                    "option is known."
                )
    if sum(name == MASK for name, _ in used) > 1:
        raise UserError(f"{shown}: {{mask}} stands there more than once; one is allowed.")
    if not may_be_plain and not any(name != MASK for name, _ in used):
        raise UserError(f"{shown} shows nothing of a row; use {names}.")
    if needed and not any(name in needed or "with_option" in filters for name, filters in used):
        raise UserError(f"{shown} does not show the {needed[0]}; use {{{needed[0]}}}.")
