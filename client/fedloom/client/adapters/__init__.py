"""Adapter kinds: one kind, one file."""
