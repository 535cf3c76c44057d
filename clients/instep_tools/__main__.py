"""`python -m instep_tools`: the same as `instep-client`."""

from instep_tools import main

main()
