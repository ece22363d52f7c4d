"""State on disk: the event log, tensors by their digest, the audit log."""
