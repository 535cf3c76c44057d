"""`python -m instep_client.commands`: the same as `instep-client`."""

from instep_client.commands import main

main()
