"""Private and held-out data: load, split among clients, tokenize, batch."""
