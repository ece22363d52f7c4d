"""Private and held-out data of text classification: load, split among clients, tokenize, batch."""
