"""Data that cannot be read because of this machine, not because of the file, is never skipped."""

import dataclasses
import os
import resource
import subprocess
import sys

import of_config
import pyarrow as pa
import pytest
from logs import write_log

from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.logs import orc
from s2s_jax.errors import MachineError, UserError
from s2s_serve.encoding import features

ROWS = [{"item_id": [1, 2, 3]}, {"item_id": [4, 5]}]


@pytest.fixture
def skipping(tmp_path) -> Config:
    write_log(tmp_path / "a.orc", ROWS, {"item_id": pa.list_(pa.int64())})
    base = Config()
    return Config(
        io=IOConfig(data_paths=str(tmp_path), on_error="skip_stripe", batch_size=2, thread_num=0),
        features=(FeatureConfig(name="item_id", hash_bucket_size=10),),
        model=ModelConfig(seq_len=4),
        loss=dataclasses.replace(base.loss, target_features=None),
    )


TROUBLE = [
    (PermissionError(13, "Permission denied"), "let this user read it"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (OSError(116, "Stale file handle"), "mount"),
    (pa.ArrowMemoryError("malloc of size 1048576 failed"), "too little memory"),
    (
        pa.ArrowException(
            "Unknown error: Time zone file /usr/share/zoneinfo/US/Pacific does not exist."
        ),
        r"no time zone US/Pacific \(in /usr/share/zoneinfo/\).*tzdata-legacy",
    ),
    (OSError("IOError: read failed. Detail: [errno 24] Too many open files"), "ulimit -n"),
]


@pytest.mark.parametrize(("error", "words"), TROUBLE)
def test_trouble_of_this_machine_is_never_skipped(skipping, monkeypatch, error, words):
    index = of_config.index(skipping)

    class Broken:
        def __init__(self, *_):
            raise error

    monkeypatch.setattr(orc.pyarrow.orc, "ORCFile", Broken)
    for read in (
        lambda: of_config.index(skipping),
        lambda: next(of_config.reader(skipping, 2, index=index)),
        lambda: of_config.collect(skipping),
    ):
        with pytest.raises(MachineError, match=words):
            read()


def test_a_lack_of_memory_while_decoding(skipping, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(features, "_fill", fail)
    for read in (lambda: next(of_config.reader(skipping, 2)), lambda: of_config.collect(skipping)):
        with pytest.raises(MachineError, match="cannot be decoded: too little memory"):
            read()


def test_an_impossible_size_counts_as_damage(skipping, monkeypatch):
    file = of_config.index(skipping).files[0]

    def damaged(*_):
        raise pa.ArrowMemoryError("malloc of size 9223372036854775807 failed")

    monkeypatch.setattr(orc.pyarrow.orc, "ORCFile", damaged)
    with pytest.raises(UserError) as caught:
        orc.read_stripe(file, 0, ["item_id"])
    assert not isinstance(caught.value, MachineError)


def test_a_machine_without_time_zones(tmp_path):
    """The library looks for time zones only once per process."""
    times = pa.array([[1, 2]], pa.list_(pa.timestamp("ns")))
    pa.orc.write_table(pa.table({"time": times}), str(tmp_path / "a.orc"))
    code = (
        "import sys; from pathlib import Path; from s2s_jax.data.logs import orc;"
        "orc.read_stripe(orc.read_footer(Path(sys.argv[1])), 0, ['time'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.orc")]
    done = subprocess.run(
        command, env=os.environ | {"TZDIR": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert "MachineError" in done.stderr
    assert "tzdata" in done.stderr.splitlines()[-1]


def test_too_many_open_files(skipping):
    file = of_config.index(skipping).files[0]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(MachineError, match="ulimit"):
            orc.read_stripe(file, 0, ["item_id"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
