"""Write the rows of a run as a task of lm-evaluation-harness, which then scores the same tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.files import strict_json
from smezo_cli.scoring import squad
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.tokens import appended, token_ids
from smezo_cli.tasks import Prompt, Row

#: Its tasks, their rows and the Python that they name lie in this folder of an export.
FOLDER = "lm_eval"

_FURTHEST = 64  # characters that may go over from the end of a prompt to its choices

_CHOICE = """\
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
process_results: !function smezo_task.decide
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""

_GENERATION = """\
output_type: generate_until
doc_to_text: context
doc_to_target: answers
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: MAX_NEW_TOKENS}
process_results: !function smezo_squad.compare
metric_list:
  - {metric: f1, aggregation: mean, higher_is_better: true}
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def task_name(task: str) -> str:
    """Return the name that lm-eval knows a task by."""
    return "smezo_" + re.sub(r"\W+", "_", task)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a prompt whose scores lm-eval has no form for."""
    for prompt in prompts:
        of = f" of part {prompt.part}" if prompt.part else ""
        if prompt.is_masked:
            raise UserError(
                f"--lm-eval: the prompt{of} has a {{mask}}, and lm-evaluation-harness scores what "
                "follows a prompt alone: leave --lm-eval out, smezo eval scores the run."
            )
        if prompt.sfc is not None:
            raise UserError(
                f"--lm-eval: the scores{of} are calibrated (task.sfc=true), those under another "
                "prompt are taken off, and lm-evaluation-harness has no form for that: leave "
                "--lm-eval out, smezo eval scores the run."
            )


def task_files(
    node: Mapping[str, Any],
    rows: Sequence[Row],
    encoded: Sequence[Candidates],
    prompt: Prompt,
    tokenizer: Any,
) -> dict[str, str]:
    """Return the texts of the files of one task by their names.

    Args:
        node: the checked task node.
        rows: that are to be scored.
        encoded: the same rows as tokens.
        prompt: under which they were encoded.
        tokenizer: of the model.

    Raises:
        UserError: lm-eval would score other tokens than smezo does.
    """
    if ends := appended(tokenizer):
        words = " ".join(tokenizer.convert_ids_to_tokens(ends))
        raise UserError(
            f"--lm-eval: the model's tokenizer puts {words} behind a text, which lm-evaluation-"
            "harness leaves there, before the answer: save the tokenizer without it."
        )
    name = task_name(node["name"])
    is_generated = node["kind"] == "generation"
    docs = _answer_docs(rows, prompt) if is_generated else _docs(rows, encoded, prompt, tokenizer)
    form = _GENERATION if is_generated else _CHOICE
    head = f"# Written by smezo export --lm-eval: {len(rows)} rows.\n"
    head += f"task: {name}\ncustom_dataset: !function smezo_task.rows\n"
    head += f"dataset_kwargs: {{file: {name}.jsonl}}\ntest_split: test\n"
    tail = 'target_delimiter: ""\nnum_fewshot: 0\nmetadata: {version: 1.0}\n'
    text = head + form.replace("MAX_NEW_TOKENS", str(node.get("max_new_tokens"))) + tail
    lines = "".join(f"{strict_json.dumps(doc, ensure_ascii=False)}\n" for doc in docs)
    files = {f"{name}.yaml": text, f"{name}.jsonl": lines}
    files["smezo_task.py"] = Path(__file__).with_name("lm_eval_task.py").read_text(encoding="utf-8")
    if is_generated:
        files["smezo_squad.py"] = Path(squad.__file__).read_text(encoding="utf-8")
    return files


def _answer_docs(rows: Sequence[Row], prompt: Prompt) -> list[dict[str, Any]]:
    return [
        {"id": row.id, "context": prompt.context(row.fields), "answers": list(row.answers)}
        for row in rows
    ]


def _docs(
    rows: Sequence[Row], encoded: Sequence[Candidates], prompt: Prompt, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return rows with candidates: texts that lm-eval parts where smezo parts the tokens."""
    docs = []
    for row, tokens in zip(rows, encoded, strict=True):
        context = prompt.context(row.fields)
        if tokens.num_merged or not (head := _head(context, tokenizer)):
            raise UserError(
                f"--lm-eval: row {row.id}: its prompt shares a token with its answers, or has "
                "none that stands alone before them, and lm-evaluation-harness would score other "
                "tokens than smezo does: leave --lm-eval out, or choose another task.prompt."
            )
        rest = context[len(head) :]
        choices = [text[len(head) :] for text in prompt.candidates(row)]
        docs.append(
            {
                "id": row.id,
                "context": head,
                "choices": [*choices, rest] if rest else choices,
                "num_tokens": list(tokens.num_option),
                "label": tokens.label,
                "right": sorted(tokens.correct),
            }
        )
    return docs


def _head(context: str, tokenizer: Any) -> str:
    """Return the longest begin of a prompt that lm-eval keeps as it is; "" where there is none.

    It ends in no white space, and its tokens are the first of the prompt's: lm-eval scores as many
    tokens as a text has more than its context, whichever these are.
    """
    (ids,) = token_ids(tokenizer, [context])
    for end in range(len(context), max(0, len(context) - _FURTHEST), -1):
        head = context[:end]
        if head[-1].isspace():
            continue
        (found,) = token_ids(tokenizer, [head])
        if ids[: len(found)] == found and (len(found) < len(ids) or end == len(context)):
            return head
    return ""
