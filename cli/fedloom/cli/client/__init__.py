"""Commands for a data owner."""
