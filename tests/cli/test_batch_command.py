"""What `s2s batch` prints."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
from logs import write_log

from s2s_jax.cli import main as front
from s2s_jax.errors import UserError

CONFIG = """
from s2s_jax.config import *

def get_config():
    return Config(
        io=IOConfig(data_paths={log!r}, batch_size=4, shuffle=False),
        features=(
            FeatureConfig(name="item_id", emb_dim=8, hash_bucket_size=0),
            FeatureConfig(name="tags", emb_dim=8, hash_bucket_size=10, bag_size=2),
            FeatureConfig(
                name="hour", column="timestamp", op="hour_of_day", emb_dim=8, hash_bucket_size=24,
                of_next=True,
            ),
        ),
        model=ModelConfig(seq_len=8, hidden_size=8, nhead=2, num_layers=1),
        loss=LossConfig(target_features=("item_id",)),
        train=TrainConfig(train_steps=1, output_dir={run!r}),
    )
"""


@pytest.fixture
def config(tmp_path) -> str:
    ints = pa.list_(pa.int64())
    types = {"item_id": ints, "tags": pa.list_(ints), "timestamp": ints}
    rows = [
        {
            "item_id": [user * 100 - 7 * n for n in range(length)],
            "tags": [[n, 13] if n else [] for n in range(length)],
            "timestamp": [86_400 * 20_000 + 3600 * n for n in range(length)],
        }
        for user, length in enumerate([3, 2, 8, 1, 2, 2])
    ]
    write_log(tmp_path / "log" / "a.orc", rows, types)
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.format(log=str(tmp_path / "log"), run=str(tmp_path / "run")))
    return str(path)


def printed(capsys, *arguments: str) -> list[list[str]]:
    """The words of each line, split where there are two blanks."""
    assert front.main(["batch", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_a_row(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = printed(capsys, config, "--rows", "1", "--loss.pairing", "next")
    devices = int(re.search(r"on (\d+) cpu", lines[0][0])[1])
    assert lines[0][0].startswith(
        f"Batch of step 1: 6 rows of the log (there is room for {4 * devices})"
    )
    assert ["length", "int32", f"1 x {4 * devices}", "A x B"] in [line[:4] for line in lines]
    assert ["ids/item_id", "int32", f"1 x {4 * devices} x 8 x 1 x 2", "A x B x L x K x 2"] in [
        line[:4] for line in lines
    ]
    begin = lines.index(["Microbatch 0, row 0: 3 positions"])
    # 2024-10-04 is 20,000 days after 1970; the hour is that of the next event.
    assert [line for line in lines[begin + 1 :] if line[0].isdecimal()] == [
        ["0", "2024-10-04 00:00:00", "0", "-", "1", "1: -7"],
        ["1", "2024-10-04 01:00:00", "-7", "1 3", "2", "2: -14"],
        ["2", "2024-10-04 02:00:00", "-14", "2 3", "-", "-"],
    ]
    headings = [" ".join(line) for line in lines[begin + 1 : begin + 4]]
    assert any("hour" in heading for heading in headings)
    assert any("hour_of_day of next" in heading for heading in headings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "mine.py"]


def test_times_of_the_model_are_described(config, capsys):
    lines = printed(capsys, config, "--model.time_bias", "gaps", "--rows", "0")
    (row,) = (line for line in lines if line[0] == "time")
    assert row[3:] == ["A x B x L", "time of each event, in seconds"]


def test_long_rows_are_shown_by_their_ends(config, capsys):
    lines = printed(capsys, config, "--rows", "3", "--positions", "4")
    begin = lines.index(["Microbatch 0, row 2: 8 positions"])
    firsts = [line[0] for line in lines[begin + 1 :] if re.fullmatch(r"\d+|…", line[0])]
    assert firsts == ["0", "1", "…", "6", "7"]


def test_packed_sequences_are_apart(config, capsys):
    arguments = ["--io.sequences", "pack", "--io.sequences.rows", "6", "--io.batch_size", "3"]
    lines = printed(capsys, config, *arguments, "--rows", "9", "--sequences", "2")
    titles = [line[0] for line in lines if line[0].startswith("Microbatch")]
    assert "Microbatch 0, row 0, packed sequence 0 of 1: 8 positions" in titles
    matches = [re.search(r"row (\d+), packed sequence (\d+) of (\d+)", title) for title in titles]
    shown = [tuple(map(int, found.groups())) for found in matches]
    for row in {row for row, _, _ in shown}:
        numbers = [number for r, number, _ in shown if r == row]
        assert numbers == list(range(min(2, *[total for r, _, total in shown if r == row])))
    more = [line[0] for line in lines if line[0].startswith("…") and "more packed" in line[0]]
    assert len(more) == sum(total > 2 for _, number, total in shown if number == 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "--step: expected at least 1, found 0"),
        (["--rows", "-1"], "--rows: expected at least 0, found -1"),
        (["--positions", "1"], "--positions: expected at least 2, found 1"),
        (["--sequences", "0"], "--sequences: expected at least 1, found 0"),
        (["--batch_size", "3"], "--batch_size: no such option; did you mean --io.batch_size?"),
    ],
)
def test_mistakes(config, words, message):
    with pytest.raises(UserError) as caught:
        front.main(["batch", config, *words])
    assert str(caught.value).startswith(message)


def test_no_rows_of_a_log_that_is_elsewhere(tmp_path, config):
    with pytest.raises(UserError, match=r"io\.data_paths"):
        front.main(["batch", config, "--io.data_paths", str(Path(tmp_path) / "none")])
