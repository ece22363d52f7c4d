"""Data sets that come as packages: rated sentences, newsgroup posts and pictures of clothes."""
