"""Local training and evaluation on this machine's device."""
