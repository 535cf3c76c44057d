"""Measurements that back the claims of the documentation: each compares within one run, on one machine."""
