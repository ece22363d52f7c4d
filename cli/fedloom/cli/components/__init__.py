"""What can be named in a run file, and how to add to it."""
