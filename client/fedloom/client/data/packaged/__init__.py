"""Data sets that a run names: rated sentences, newsgroups, pictures of clothes, and made-up rows of several jobs."""
