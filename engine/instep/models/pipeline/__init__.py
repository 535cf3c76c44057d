"""A kind of model: stateful steps before and after a network of any other kind."""
