"""Dual LoRA: two pairs on every layer, of which one can be shared and the other kept (FedDPA, Yang et al., NeurIPS 2024, arXiv 2403.19211).

y = W0 x + b + s (B_s A_s x + B_o A_o x), so W = W0 + s (B_s A_s + B_o A_o).
"""
