"""`python -m loram` is `loram`."""

from loram.cli import main

main()
