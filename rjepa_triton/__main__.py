"""`python -m rjepa_triton`: the `rjepa` command."""

from .cli import main

main()
