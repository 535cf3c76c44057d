"""The device side: state store, staging and step executors."""
