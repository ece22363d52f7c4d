"""Strategies that train one factor of a pair at a time."""
