"""The coordinator's gRPC server. It translates, and decides nothing."""
