"""How a client reaches its coordinator: gRPC, TLS, enrollment."""
