"""A node as a program of its own, for what must be in place before the interpreter starts."""

import json
import sys
from pathlib import Path

from tests.chaos import node

if __name__ == "__main__":
    task, folder = json.loads(sys.argv[1])
    sys.exit(node.main(task, Path(folder)))
