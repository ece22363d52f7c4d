"""What training did to an adapter: what averaging lost, how far clients are apart, what noise adds, new directions."""
