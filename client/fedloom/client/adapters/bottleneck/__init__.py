"""Adapter kinds that put small networks between the layers of the base model."""
