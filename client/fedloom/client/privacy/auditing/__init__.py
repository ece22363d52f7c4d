"""Attacks on the mechanism, and the lower bounds on epsilon that they prove."""
