"""The `fedloom` command. Each command's work is imported when it runs, so a coordinator needs no torch."""
