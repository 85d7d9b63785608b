"""Recommendations in a directory, to which several processes write."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import config_file, evaluating
from jobs_of import one_device
from logs import write_log
from places import REPO

from s2s_jax.cluster.place import COORDINATOR, HOST, NUM_HOSTS
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError
from s2s_jax.jobs.recommend import Request, recommend
from s2s_jax.jobs.stripe_recommender import StripeRecommender
from s2s_jax.jobs.train import train
from s2s_jax.ranking.part_directory import PartDirectory, Share, divide

USERS, ITEMS, K = 66, 20, 4
MADE_FOR = {"checkpoint": [1, "a"], "input": [["x", "y"]]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and its log: eleven stripes of six rows, one of them without events."""
    directory = tmp_path_factory.mktemp("shared")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        length = int(rng.integers(2, 13)) if user // 6 != 4 else 0
        bags = [[int(item)] for item in rng.integers(0, ITEMS, length)]
        rows.append({"user": user, "item_id": bags, "behavior_id": bags, "tags": bags})
    ids = pa.list_(pa.list_(pa.int64()))
    types = {"user": pa.int64(), "item_id": ids, "behavior_id": ids, "tags": ids}
    for number in range(11):
        mine = rows[6 * number :][:6]
        write_log(directory / "log" / f"part-{number:02}.orc", mine, types)
    config = evaluating(directory / "log", directory / "run")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=1),
        train=dataclasses.replace(config.train, train_steps=2),
        eval=dataclasses.replace(config.eval, batch_size=8),
    )
    assert not train(config, one_device())
    return config


@pytest.fixture(scope="module")
def expected(trained, tmp_path_factory):
    """What one process writes to a file."""
    output = tmp_path_factory.mktemp("whole") / "recs.parquet"
    done = recommend(trained, request_of(trained, output), one_device())
    return pq.read_table(output), done.counts


def request_of(config, output, host=0, hosts=1):
    return Request(
        input=config.io.data_paths,
        output=output,
        top_k=K,
        user_column="user",
        checkpoint="newest",
        share=Share(host, hosts),
    )


def assert_complete(directory, expected):
    table, counts = expected
    assert (directory / "_SUCCESS").exists()
    assert pq.read_table(directory).equals(table)
    manifest = json.loads((directory / "_manifest.json").read_text())
    assert manifest["rows"] == table.num_rows
    assert manifest["counts"] == counts
    files = [part["file"] for part in manifest["parts"]]
    assert files == sorted(path.name for path in directory.glob("*.parquet"))
    rows = [pq.read_metadata(directory / name).num_rows for name in files]
    assert [part["rows"] for part in manifest["parts"]] == rows
    left = {path.name for path in directory.iterdir()} - set(files)
    assert left == {"_SUCCESS", "_manifest.json", "_made_for.json"}


@pytest.mark.parametrize("hosts", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_continues_what_others_left(
    trained, expected, tmp_path, monkeypatch, hosts
):
    output = tmp_path / "recs"
    whole = StripeRecommender.recommend

    def killed(self, stripes):
        for done, found in enumerate(whole(self, stripes)):
            if done == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(StripeRecommender, "recommend", killed)
    for host in (1, 0):
        with pytest.raises(KeyboardInterrupt):
            recommend(trained, request_of(trained, output, host, 2), one_device())
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert len(before) == 6
    monkeypatch.setattr(StripeRecommender, "recommend", whole)
    for host in range(hosts):
        assert not (output / "_SUCCESS").exists()
        done = recommend(trained, request_of(trained, output, host, hosts), one_device())
        assert (done.counts is None) == (host < hosts - 1)
    assert done.counts == expected[1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_complete(output, expected)
    # Nothing is done again.
    monkeypatch.setattr(StripeRecommender, "_one_batch", None)
    assert recommend(trained, request_of(trained, output), one_device()).counts == expected[1]
    assert_complete(output, expected)


@pytest.mark.parametrize("name", ["recs", "recs.parquet"])
def test_stripes_that_cannot_be_read_are_left_out_and_are_not_done_for_others(
    trained, tmp_path, monkeypatch, name
):
    """All columns of one stripe, and the user column of another. (Stripe 4 has no events.)"""
    log = shutil.copytree(Path(trained.io.data_paths), tmp_path / "log")
    begin, end = orc.read_footer(log / "part-02.orc").stripe_ranges[0]
    data = (log / "part-02.orc").read_bytes()
    (log / "part-02.orc").write_bytes(data[:begin] + b"\xff" * (end - begin) + data[end:])
    read_stripe = orc.read_stripe

    def without_users(file, stripe, columns):
        if file.path.name == "part-05.orc" and list(columns) == ["user"]:
            raise UserError("part-05.orc: stripe 0 cannot be read")
        return read_stripe(file, stripe, columns)

    monkeypatch.setattr(orc, "read_stripe", without_users)
    request = request_of(trained, tmp_path / name)
    request = dataclasses.replace(request, input=str(log), by="neighbours", checkpoint="best")
    skipping = dataclasses.replace(trained.io, on_error="skip_stripe")
    counts = recommend(dataclasses.replace(trained, io=skipping), request).counts
    assert counts["skipped_rows"] == 12
    users = pq.read_table(tmp_path / name)["user"].to_pylist()
    assert users == [user for user in range(USERS) if user // 6 not in (2, 4, 5)]
    assert counts["users"] == len(users)
    if name == "recs":
        manifest = json.loads((tmp_path / name / "_manifest.json").read_text())
        assert manifest["counts"]["skipped_rows"] == 12
    with pytest.raises(UserError, match=r"part-02\.orc: stripe 0 cannot be read"):
        recommend(trained, request)


def open_one(path, made_for=MADE_FOR, host=0, hosts=1):
    return PartDirectory(path, made_for, [3, 4, 5], Share(host, hosts))


def test_other_parts_and_other_files_are_refused_and_kept(tmp_path):
    output = tmp_path / "recs"
    open_one(output).close()
    with pytest.raises(
        UserError, match="made with another checkpoint; give all processes the same"
    ):
        open_one(output, MADE_FOR | {"checkpoint": [2, "b"]}, 1, 2)
    first = open_one(output, host=0, hosts=2)
    with pytest.raises(UserError, match="another process is host 0 of 2"):
        open_one(output, host=0, hosts=2)
    second = open_one(output, host=1, hosts=2)
    assert (first.missing(3), second.missing(3)) == ([0, 2], [1])
    first.close()
    second.close()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    with pytest.raises(UserError, match=r"has other files \(found mine.txt\)"):
        open_one(other)
    assert (other / "mine.txt").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output: .*file cannot be written"):
        open_one(tmp_path / "file")


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_that_finish_together_both_succeed(tmp_path, monkeypatch, locks, capsys):
    """One completes the directory while the other is about to rename its file; without locks of files,
    as on some network file systems, it cannot know that."""
    if not locks:

        def unsupported(*_):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(fcntl, "flock", unsupported)
    output, row, ends = tmp_path / "recs", pa.table({"x": [1]}), []
    first, second = (open_one(output, host=host, hosts=2) for host in range(2))
    for stripe, parts in ((0, first), (1, second), (2, first)):
        parts.write(stripe, row, {"users": 1})
    # Of a process that was killed.
    for name in ("_lock-0-of-3", "_unfinished-0-of-3", "_unfinished-1-of-3"):
        (output / name).touch()
    replace = Path.replace

    def slowly(self, target):
        if self.name == "_unfinished-1-of-2":
            monkeypatch.setattr(Path, "replace", replace)
            ends.append(first.join())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slowly)
    ends.append(second.join())
    assert ends == [{"users": 3}, {"users": 3}]
    first.close()
    second.close()
    parts = [f"part-00000{n}.parquet" for n in range(3)]
    names = sorted(path.name for path in output.iterdir())
    assert names == ["_SUCCESS", "_made_for.json", "_manifest.json", *parts]


def test_parts_depend_only_on_the_log():
    rows = np.random.default_rng(0).integers(1, 3_000, 20_000).tolist()
    parts = divide(rows)
    assert [stripe for part in parts for stripe in part] == list(range(20_000))
    sizes = [sum(rows[n] for n in part) for part in parts]
    assert min(sizes[:-1]) >= 2**15
    assert max(sizes) < 2**15 + 3_000
    # Enough parts of a small log for many processes, but no stripe is divided.
    assert len(divide([10] * 1_000)) > 200
    assert divide([5, 900_000]) == [range(0, 2)] or divide([5, 900_000]) == [range(1), range(1, 2)]


def start(config_path, config, output, host, hosts, env=None):
    command = [sys.executable, "-m", "s2s_jax", "recommend", "--config", config_path]
    command += ["--input", config.io.data_paths, "--output", str(output), "--top_k", str(K)]
    command += ["--user_column", "user", "--checkpoint", "newest"]
    place = {COORDINATOR: "localhost:1", NUM_HOSTS: str(hosts), HOST: str(host)}
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(REPO)} | place | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_commands_share_a_log_and_survive_a_kill(trained, expected, tmp_path):
    output, path = tmp_path / "recs.parquet", config_file(trained, tmp_path)
    processes = [start(path, trained, output, host, 2) for host in range(2)]
    while not list(output.glob("part-*")):
        assert any(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    processes = [start(path, trained, output, host, 4) for host in range(4)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert any(re.search(f"wrote up to {K} items for each of 60 users", text) for text in said), (
        said
    )
    assert_complete(Path(output), expected)
