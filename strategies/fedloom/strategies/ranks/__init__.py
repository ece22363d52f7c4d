"""Strategies in which each client works at a rank of its own."""
