"""Methods of merging: what one layer gets of the products of several adapters. One method, one file."""
