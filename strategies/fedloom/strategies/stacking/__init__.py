"""Strategies that add up products: the stacked factors of all clients are those of the sum."""
