"""Test modules cannot import their neighbours; this makes `serving` one they can."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
