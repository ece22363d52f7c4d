"""Local optimisers: one optimiser, one file. torch is imported where one is made: a coordinator asks them too."""
