"""Merging finished adapters: several LoRA adapters of one base model become one, product by product."""
