"""Scores of an adapter on held-out rows."""
