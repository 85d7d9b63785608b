"""Paths of files that tests read."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HELPERS = REPO / "tests" / "helpers"
# Real logs, which may be missing.
DATA = Path(os.environ.get("S2S_JAX_DATA", str(REPO.parent / "shared" / "data")))
