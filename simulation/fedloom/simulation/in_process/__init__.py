"""The in-process engine: one process, one base model, clients in turn or several at once."""
