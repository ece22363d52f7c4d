"""Adapter kinds of low rank beside LoRA."""
