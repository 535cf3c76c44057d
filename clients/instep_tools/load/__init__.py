"""`instep-client loadtest`: how much a server does, and how fast.

A plan is split into one part a process (`plan`). Each process sends its part (`generator`, `processes`) and takes a
sample of every answer (`samples`). The result is judged (`result`), compared with other numbers of streams (`search`),
and told as text, file or picture (`report`, `saved`, `plot`).
"""
