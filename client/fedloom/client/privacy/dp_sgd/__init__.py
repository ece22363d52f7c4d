"""DP-SGD: per-example gradients, clipping, noise, and the probe that checks them."""
