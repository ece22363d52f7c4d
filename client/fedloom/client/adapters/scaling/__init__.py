"""Adapter kinds that scale and shift what layers give."""
