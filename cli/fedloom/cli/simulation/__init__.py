"""Commands for experiments on one machine."""
