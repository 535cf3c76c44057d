"""`python -m instep`."""

from instep.cli import main

main()
