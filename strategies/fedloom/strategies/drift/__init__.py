"""Strategies that correct the drift of unlike clients: a term for each client's gradients, from what it sent before."""
