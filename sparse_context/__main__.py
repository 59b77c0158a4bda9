"""`python -m sparse_context` is the command `sparse-context`."""

from .cli import main

main()
