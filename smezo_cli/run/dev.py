"""Evaluate dev during training."""

from collections.abc import Callable

from smezo_cli.methods.base import Method
from smezo_cli.run.begin import Run
from smezo_cli.run.evaluator import Evaluator
from smezo_cli.run.rows import Rows
from smezo_cli.run.self_check import check_reads
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.parts import of_one_part


def evaluate_dev(
    run: Run, evaluate: Evaluator, method: Method, rows: Rows
) -> Callable[[], Evaluation]:
    """Return what evaluates dev at the present weights; the loop says when, and saves it.

    The first time, two rows of dev are checked as those of train were: a model may take another
    path at other rows, or after some steps.
    """
    two = of_one_part(row for row in rows.dev if row.gold >= 0)[:2]
    # Of several ranks none may come to compute in a way of its own.
    left = [two] if two and evaluate.team is None else []

    def evaluated() -> Evaluation:
        if left:
            check_reads(run, method, evaluate.loaded, left.pop())
        made = getattr(method, "num_steps", 0)
        found = evaluate(rows.dev, "dev", step=run.state.step, made=made)
        evaluate.partial.forget()
        return found

    return evaluated
