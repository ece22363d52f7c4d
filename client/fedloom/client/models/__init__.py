"""The base model: load, check, quantise."""
