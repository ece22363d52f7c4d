"""A client's session: join, train, submit, until the run is over."""
