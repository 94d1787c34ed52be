"""Answers side by side."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text


def side_by_side(answers: Mapping[str, str], title: str = "") -> Table:
    """Return a table with one column per answer, all of one width.

    Args:
        answers: the name of who answers -> the answer.
        title: what stands above them.
    """
    table = Table(title=Text(title), title_justify="left", expand=True)
    for name in answers:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    return table
