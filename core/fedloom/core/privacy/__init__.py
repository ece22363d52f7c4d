"""Privacy accounting and the noise mechanism, in numpy and integers."""
