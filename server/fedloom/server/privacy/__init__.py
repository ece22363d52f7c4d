"""User-level differential privacy: the coordinator's ledger."""
