"""`instep loadtest`: how much a server does, and how fast.

A plan is split into one part for each process (`plan`). Each process sends its part (`generator`, `processes`) and
takes a sample of every answer. The result is judged (`result`), compared with other numbers of streams (`search`), and
shown on the terminal, as JSON or as a page (`page`).
"""
