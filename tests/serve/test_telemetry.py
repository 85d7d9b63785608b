"""Nothing that an export needs reports to anybody."""

import os
import subprocess
import sys

from places import REPO

# ONNX Runtime reports only on machines that do not look like those of tests.
_HIDDEN = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "XDG_CACHE_HOME")


def test_onnx_runtime_does_not_report(small_export, tmp_path):
    # It gives the machine a number before it reports, in a file in the home directory.
    code = (
        "import sys, s2s_serve\n"
        "model = s2s_serve.load(sys.argv[1])\n"
        "model.encode([dict.fromkeys(model.features, [None])])"
    )
    here = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    subprocess.run(
        [sys.executable, "-c", code, small_export.directory],
        check=True,
        env=here | {"HOME": str(tmp_path), "PYTHONPATH": str(REPO)},
    )
    assert list(tmp_path.iterdir()) == []
