"""Read tasks: prompts, labelled rows and their splits."""

from smezo_cli.tasks.base import Prompt, Row, Task
from smezo_cli.tasks.load import load_task

__all__ = ["Prompt", "Row", "Task", "load_task"]
