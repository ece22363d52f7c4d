"""Simulated clients that take time, go away and drop out: discrete events on a clock that nobody waits for."""
