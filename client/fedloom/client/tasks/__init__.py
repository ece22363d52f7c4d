"""Tasks: what a model is trained for. One task, one file."""
