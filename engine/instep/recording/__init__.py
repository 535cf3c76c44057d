"""The durable log of what streams sent and got."""
