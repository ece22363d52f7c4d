"""The Ray engine: clients are trained by actors on one machine or a cluster of them."""
