"""Data sets that are named: rated sentences, newsgroup posts, pictures of clothes, and made-up rows of several jobs."""
