"""The device side: the state store, batches and step executors."""
