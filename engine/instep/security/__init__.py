"""The one place that decides who may do what: keys, principals, policy. Nothing else knows roles."""
