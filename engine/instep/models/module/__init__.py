"""A user's own step, `y, new_state = step(x, state)`, exported as a graph of torch's operators."""
