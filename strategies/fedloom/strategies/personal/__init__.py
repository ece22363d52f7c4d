"""Strategies in which part of the adapter stays with its client."""
