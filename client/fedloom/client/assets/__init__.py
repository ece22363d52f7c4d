"""Demo models and data sets, fetched as packages."""
