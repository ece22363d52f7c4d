"""Adapter kinds: one PEFT kind, one file."""

from fedloom.client.adapters.api import Slot
from fedloom.client.adapters.attach import attach

__all__ = ["Slot", "attach"]
