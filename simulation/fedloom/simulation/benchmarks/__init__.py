"""Measurements of the coordinator: rounds, many clients, secure sums."""
