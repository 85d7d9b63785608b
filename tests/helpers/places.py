"""Where things lie that tests read."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HELPERS = REPO / "tests" / "helpers"
# Real logs, which need not be there.
DATA = Path(os.environ.get("S2S_JAX_DATA", str(REPO.parent / "shared" / "data")))
