"""Fixtures that attacks share with the tests of what they attack."""

from tests.dashboard.conftest import live

__all__ = ["live"]
