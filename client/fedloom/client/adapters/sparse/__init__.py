"""Adapter kinds that train chosen entries of the pretrained weights."""
