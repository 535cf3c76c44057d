"""The protocol that client and engine share: wire, codes, errors. It imports nothing of either."""
