"""Tasks that learn which answers are preferred."""
