"""Robust aggregation rules in place of the mean."""
