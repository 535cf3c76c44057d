"""The commands of `instep` that need no engine: they send frames, watch servers and read files."""
