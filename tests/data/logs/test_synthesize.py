import contextlib
import itertools
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import of_config
import pyarrow as pa
import pyarrow.orc
import pytest
from logs import write_log

from s2s_jax.cli.commands.synthesize import main
from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.items.titles import read_titles
from s2s_jax.data.logs.synthesize import Settings, synthesize
from s2s_jax.errors import UserError

SMALL = {"users": 600, "items": 120, "categories": 6, "files": 3, "mean_length": 30.0}


def read(paths: list[Path]) -> list[dict]:
    return [row for path in paths for row in pyarrow.orc.read_table(str(path)).to_pylist()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read(synthesize(Settings(output=tmp_path_factory.mktemp("log") / "new", **SMALL)))


def successor_share(rows: list[dict]) -> tuple[float, dict[int, int]]:
    """The share of events whose item is the most frequent successor, and the successor of each item."""
    followers = defaultdict(Counter)
    for row in rows:
        items = [item for (item,) in row["item_id"]]
        for item, following in itertools.pairwise(items):
            followers[item][following] += 1
    best = {item: found.most_common(1)[0] for item, found in followers.items()}
    pairs = sum(found.total() for found in followers.values())
    return sum(n for _, n in best.values()) / pairs, {
        item: next_ for item, (next_, _) in best.items()
    }


def test_files_columns_and_types(tmp_path):
    paths = synthesize(Settings(output=tmp_path / "a" / "b", **SMALL))
    assert paths == [tmp_path / "a" / "b" / f"part-{i}.orc" for i in range(3)]
    assert sorted((tmp_path / "a" / "b").iterdir()) == [*paths, tmp_path / "a" / "b" / "titles.csv"]
    ids, texts = pa.list_(pa.list_(pa.int64())), pa.list_(pa.list_(pa.string()))
    for path in paths:
        table = pyarrow.orc.read_table(str(path))
        assert table.num_rows == 200
        assert dict(zip(table.schema.names, table.schema.types, strict=True)) == {
            "user_id": pa.int64(),
            "item_id": ids,
            "cate_id": ids,
            "behavior_id": texts,
            "timestamp": texts,
        }


def test_titles_tell_what_follows_and_the_category(tmp_path, rows):
    """The item that most often follows "lamp 7" in the log is "lamp 8"."""
    synthesize(Settings(output=tmp_path, **SMALL))
    titles = read_titles(tmp_path / "titles.csv")
    _, follower = successor_share(rows)
    ends = 0
    for item, following in follower.items():
        good, number = titles[str(item)].rsplit(" ", 1)
        next_good, next_number = titles[str(following)].rsplit(" ", 1)
        assert next_good == good
        ends += int(next_number) != int(number) + 1
        assert int(next_number) in (1, int(number) + 1)
    # After the last of a category comes its first.
    assert ends <= SMALL["categories"]
    names = defaultdict(set)
    for row in rows:
        for (item,), (category,) in zip(row["item_id"], row["cate_id"], strict=True):
            names[category].add(titles[str(item)].rsplit(" ", 1)[0])
    assert all(len(found) == 1 for found in names.values())
    assert len(set().union(*names.values())) == SMALL["categories"]


def test_titles_are_not_replaced_without_being_asked(tmp_path):
    (tmp_path / "titles.csv").write_text("mine")
    with pytest.raises(UserError, match=r"already holds titles.csv.*--overwrite True"):
        synthesize(Settings(output=tmp_path, **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["titles.csv"]
    synthesize(Settings(output=tmp_path, overwrite=True, **SMALL))
    assert (tmp_path / "titles.csv").read_text().startswith("item_id,title\n")


def test_more_categories_than_goods_have_titles_of_their_own(tmp_path):
    synthesize(Settings(output=tmp_path, users=5, items=200, categories=100, files=1))
    titles = read_titles(tmp_path / "titles.csv").values()
    assert len(set(titles)) == 201
    assert len({title.rsplit(" ", 1)[0] for title in titles}) == 101


def test_rows_are_whole(rows):
    assert len({row["user_id"] for row in rows}) == SMALL["users"]
    category_of = {}
    for row in rows:
        names = ("item_id", "cate_id", "behavior_id", "timestamp")
        assert len({len(row[name]) for name in names}) == 1
        assert all(len(bag) == 1 for name in names for bag in row[name])
        seconds = [int(second) for (second,) in row["timestamp"]]
        assert all(a < b for a, b in itertools.pairwise(seconds))
        for (item,), (category,) in zip(row["item_id"], row["cate_id"], strict=True):
            assert category_of.setdefault(item, category) == category
    assert len(category_of) == SMALL["items"]
    assert set(category_of.values()) == set(range(1, SMALL["categories"] + 1))
    assert max(category_of) > 2**40
    assert min(category_of) > 2**32


def test_lengths_sessions_and_popularity_are_skewed(rows):
    lengths = sorted(len(row["item_id"]) for row in rows)
    assert lengths[0] >= 2
    mean = sum(lengths) / len(lengths)
    assert 26 < mean < 34
    assert lengths[len(lengths) // 2] < 0.85 * mean
    assert lengths[-1] > 3 * mean
    gaps = Counter(
        int(b) - int(a) > 1500
        for row in rows
        for (a,), (b,) in itertools.pairwise(row["timestamp"])
    )
    # A session has 8 events on average.
    assert 0.09 < gaps[True] / gaps.total() < 0.16
    items = Counter(item for row in rows for (item,) in row["item_id"])
    top = sum(n for _, n in items.most_common(SMALL["items"] // 10))
    assert top > 0.2 * items.total()


def test_behaviors_have_shares_and_purchases_depend_on_the_item(rows):
    counts, bought = Counter(), defaultdict(Counter)
    for row in rows:
        for (item,), (behavior,) in zip(row["item_id"], row["behavior_id"], strict=True):
            counts[behavior] += 1
            bought[item][behavior == "buy"] += 1
    assert set(counts) == {"pv", "cart", "fav", "buy"}
    assert counts["pv"] > 0.8 * counts.total()
    assert min(counts.values()) > 0.005 * counts.total()
    shares = sorted(n[True] / n.total() for n in bought.values() if n.total() > 100)
    assert shares[-len(shares) // 10] > 5 * shares[len(shares) // 4]


def test_users_have_favorite_categories(rows):
    most = []
    for row in rows:
        if len(row["cate_id"]) >= 20:
            counts = Counter(category for (category,) in row["cate_id"])
            assert len(counts) <= 3
            most.append(counts.most_common(1)[0][1] / counts.total())
    assert sum(most) / len(most) > 0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_successors_follow_as_often_as_asked(tmp_path, share):
    made = Settings(output=tmp_path / "log", successor_share=share, **SMALL)
    found, successor = successor_share(read(synthesize(made)))
    # Other events are drawn by popularity, so some of them also hit the successor.
    assert share - 0.02 < found <= share + (1 - share) * 0.3
    if share >= 0.6:
        # Every item has a different successor, in the same category.
        assert len(set(successor.values())) == len(successor) == SMALL["items"]
        assert all(item != following for item, following in successor.items())


def test_the_same_settings_make_the_same_files(tmp_path):
    def content(name: str, **changes) -> list[bytes]:
        return [
            p.read_bytes() for p in synthesize(Settings(output=tmp_path / name, **SMALL | changes))
        ]

    first = content("first")
    assert content("again") == first
    assert content("other", seed=1)[0] != first[0]
    assert len(set(first)) == 3


def test_training_can_read_it(tmp_path):
    synthesize(Settings(output=tmp_path / "log", **SMALL))
    config = Config(
        io=IOConfig(data_paths=str(tmp_path / "log")),
        features=(
            FeatureConfig(name="item_id", hash_bucket_size=1000, hash_type="murmur"),
            FeatureConfig(name="cate_id", hash_bucket_size=1000),
            FeatureConfig(name="behavior_id", hash_bucket_size=1000, hash_type="murmur"),
            FeatureConfig(name="timestamp", hash_bucket_size=1000, hash_type="murmur"),
        ),
        model=ModelConfig(seq_len=16),
    )
    reader = of_config.reader(config, 50)
    assert reader.rows_per_epoch == SMALL["users"]
    with contextlib.closing(reader):
        batches = [next(reader).arrays for _ in range(reader.steps_per_epoch)]
    lengths = [batch["length"].min() for batch in batches]
    assert min(lengths) >= 2


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"users": 0}, "--users"),
        ({"users": -5}, "--users"),
        ({"items": 11}, "--items"),
        ({"categories": 0}, "--categories"),
        ({"files": 0}, "--files"),
        ({"files": 601}, "--files"),
        ({"mean_length": 1.5}, "--mean_length"),
        ({"mean_length": float("nan")}, "--mean_length"),
        ({"mean_length": float("inf")}, "--mean_length"),
        ({"session_length": 0.0}, "--session_length"),
        ({"successor_share": 1.1}, "--successor_share"),
        ({"successor_share": -0.1}, "--successor_share"),
        ({"zipf": -1.0}, "--zipf"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_settings_are_refused_by_flag(tmp_path, changes, flag):
    with pytest.raises(UserError) as caught:
        synthesize(Settings(output=tmp_path / "log", **SMALL | changes))
    assert str(caught.value).startswith(f"{flag}: expected ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "log").exists()


def test_the_smallest_log(tmp_path):
    (path,) = synthesize(
        Settings(output=tmp_path, users=1, items=2, categories=1, files=1, mean_length=2.0)
    )
    (row,) = read([path])
    assert len(row["item_id"]) == 2


def test_other_orc_files_are_not_mixed_with(tmp_path):
    few = SMALL | {"users": 5}
    first = synthesize(Settings(output=tmp_path, **few))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"^--output: .*part-0\.orc.*--overwrite True"):
        synthesize(Settings(output=tmp_path, **few))
    second = synthesize(Settings(output=tmp_path, overwrite=True, **few | {"files": 2}))
    assert second == first[:2]
    assert sorted(tmp_path.glob("*.orc")) == second
    other = write_log(tmp_path / "below" / "mine.orc", [{"item_id": [[1]]}])
    with pytest.raises(UserError, match=r"^--output: .*mine\.orc"):
        synthesize(Settings(output=tmp_path, overwrite=True, **few))
    assert other.exists()
    assert sorted(tmp_path.glob("*.orc")) == second


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"^--output: "):
            synthesize(Settings(output=out, **SMALL))


def test_the_command_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "log"), "--users", "20", "--files", "2"]
    assert main([*arguments, "--items", "100", "--mean_length", "5"]) == 0
    rows = read(sorted((tmp_path / "log").glob("*.orc")))
    events = sum(len(row["item_id"]) for row in rows)
    printed = capsys.readouterr().out
    assert printed == f"wrote 2 files with 20 users and {events} events to {tmp_path / 'log'}\n"
    assert main([*arguments, "--overwrite", "True"]) == 0


def test_the_command_fails_with_one_line_and_without_jax(tmp_path):
    command = [sys.executable, "-m", "s2s_jax", "synthesize", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--users", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --users: expected at least 1, found 0\n"
    names = ("synthesize", "inspect", "convert")
    modules = ", ".join(f"s2s_jax.cli.commands.{name}" for name in names)
    code = f"import sys, {modules}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
