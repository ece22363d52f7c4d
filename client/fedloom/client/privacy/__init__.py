"""Differential privacy on the client: per-example gradients, noise, the ledger."""
