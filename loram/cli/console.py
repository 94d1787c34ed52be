"""Where tables are printed."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    """Return the console of standard output; what is not a terminal is 120 columns wide."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)
