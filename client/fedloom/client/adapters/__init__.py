"""Adapter kinds: one PEFT kind, one file."""

from fedloom.client.adapters.api import Slot
from fedloom.client.adapters.attach import attach
from fedloom.client.adapters.head import Head, check_labels, find_head

__all__ = ["Head", "Slot", "attach", "check_labels", "find_head"]
