"""What a run asks for: the run file, its sections, and how files of tables are read."""
