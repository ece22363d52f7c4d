"""Adapter kinds that train within the leading singular vectors of the pretrained weights."""
