"""What strategies are composed of: averaging, bounds and noise."""
