"""Finished stripes of an interrupted command, which are only reused if everything is the same."""

import json
import os
import shutil
from pathlib import Path

import of_config
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from logs import write_log

from s2s_jax.config import Config, FeatureConfig, IOConfig
from s2s_jax.errors import UserError
from s2s_jax.jobs import recommend
from s2s_jax.ranking.parts import Parts
from s2s_jax.runs.checkpoints.store import Checkpoints

MADE_FOR = {"checkpoint": [3, "abc"], "--top_k": 5, "input": [["a.orc", "123"]]}


def table(*values):
    return pa.table({"x": pa.array(values, pa.int64())})


def test_what_is_there_is_kept_and_put_together(tmp_path):
    output = tmp_path / "out" / "recs.parquet"
    Parts(output, MADE_FOR).write(1, table(3), {"users": 1})
    parts = Parts(output, MADE_FOR)
    assert 1 in parts
    assert 0 not in parts
    parts.write(0, table(1, 2), {"users": 2})
    assert not output.exists()
    assert parts.join() == {"users": 3}
    assert pq.read_table(output)["x"].to_pylist() == [1, 2, 3]
    assert pq.read_schema(output).metadata is None
    assert os.listdir(output.parent) == ["recs.parquet"]


@pytest.mark.parametrize("key", MADE_FOR)
def test_another_command_starts_anew_and_says_why(tmp_path, key, capsys):
    output = tmp_path / "recs.parquet"
    Parts(output, MADE_FOR).write(0, table(1), {})
    parts = Parts(output, MADE_FOR | {key: "other"})
    assert 0 not in parts
    assert f"made with another {key}; starting over" in capsys.readouterr().err
    parts.close()
    Parts(output, MADE_FOR | {key: "other"})
    assert capsys.readouterr().err == ""


def test_parts_of_earlier_versions_are_not_gone_on_with(tmp_path):
    directory = tmp_path / "recs.parquet.parts"
    directory.mkdir()
    (directory / "made_for.json").write_text(json.dumps({"version": 2, "step": 3}))
    (directory / "00000000.parquet").touch()
    assert 0 not in Parts(tmp_path / "recs.parquet", MADE_FOR)


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["made_for.json", "notes"], ["00000000.parquet"]]
)
def test_a_directory_of_something_else_is_left_alone(tmp_path, names):
    directory = tmp_path / "recs.parquet.parts"
    directory.mkdir()
    for name in names:
        (directory / name).write_text("{}")
    with pytest.raises(UserError, match=r"^--output: .*parts is needed .* move it away") as caught:
        Parts(tmp_path / "recs.parquet", MADE_FOR)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(directory)) == sorted(names)


def test_a_part_of_another_command_is_made_again_and_not_joined(tmp_path):
    """As after a pause in which another command took over the lock, on a file system without locks."""
    output = tmp_path / "recs.parquet"
    other = Parts(tmp_path / "other.parquet", MADE_FOR | {"--top_k": 6})
    other.write(0, table(9), {"users": 1})
    parts = Parts(output, MADE_FOR)
    parts.write(0, table(1), {"users": 1})
    parts.write(1, table(2), {"users": 1})
    part = Path("00000000.parquet")
    shutil.copy(tmp_path / "other.parquet.parts" / part, tmp_path / "recs.parquet.parts" / part)
    with pytest.raises(UserError, match=r"00000000\.parquet was made for something else"):
        parts.join()
    assert not output.exists()
    assert parts.missing(2) == [0]
    (tmp_path / "recs.parquet.parts" / "00000001.parquet").write_bytes(b"PAR1")
    assert parts.missing(2) == [0, 1]


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_a_damaged_part_is_named(tmp_path, damage):
    parts = Parts(tmp_path / "recs.parquet", MADE_FOR)
    parts.write(0, table(*range(5000)), {})
    path = tmp_path / "recs.parquet.parts" / "00000000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:100] if damage == "cut" else data[:99] + bytes(3000) + data[3099:])
    with pytest.raises(UserError, match=f"{path} is damaged .*; remove this file") as caught:
        parts.join()
    assert "\n" not in str(caught.value)
    path.unlink()
    parts.write(0, table(1), {"users": 1})
    assert parts.join() == {"users": 1}


@pytest.mark.parametrize("names", [["made_for.tmp"], ["made_for.tmp", "00000003.tmp"], ["a part"]])
def test_what_a_full_disk_left_without_a_note_is_no_obstacle(tmp_path, names):
    directory = tmp_path / "recs.parquet.parts"
    if names == ["a part"]:
        parts = Parts(tmp_path / "recs.parquet", MADE_FOR)
        parts.write(0, table(1), {"users": 1})
        parts.close()
        (directory / "made_for.json").unlink()
    else:
        directory.mkdir()
        for name in names:
            (directory / name).touch()
    parts = Parts(tmp_path / "recs.parquet", MADE_FOR | {"--top_k": 6})
    assert parts.missing(1) == [0]
    assert os.listdir(directory) == ["made_for.json"]


def test_a_kill_while_old_parts_are_removed_is_no_obstacle(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "recs.parquet", MADE_FOR)
    for number in range(3):
        parts.write(number, table(1), {})
    parts.close()
    other, unlink, removed = MADE_FOR | {"--top_k": 6}, Path.unlink, []

    def killed(self, missing_ok=False):
        if removed:
            raise KeyboardInterrupt
        removed.append(self.name)
        unlink(self, missing_ok)

    # As a directory may list its files in any order.
    monkeypatch.setattr(
        Path, "iterdir", lambda self: [self / name for name in sorted(os.listdir(self))][::-1]
    )
    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        Parts(tmp_path / "recs.parquet", other)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert removed[0] != "made_for.json"
    assert Parts(tmp_path / "recs.parquet", other).missing(3) == [0, 1, 2]


def test_a_file_that_was_put_beside_the_parts_stays(tmp_path):
    parts = Parts(tmp_path / "recs.parquet", MADE_FOR)
    parts.write(0, table(1), {})
    (tmp_path / "recs.parquet.parts" / "mine").touch()
    parts.join()
    assert os.listdir(tmp_path / "recs.parquet.parts") == ["mine"]


def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--output: .* cannot be written"):
        Parts(tmp_path / "file" / "recs.parquet", MADE_FOR)
    parts = Parts(tmp_path / "recs.parquet", MADE_FOR)
    parts.write(0, table(1), {})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="No space left"):
        parts.write(1, table(2), {})
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match="No space left"):
        parts.join()
    parts.close()
    assert 0 in Parts(tmp_path / "recs.parquet", MADE_FOR)
    assert sorted(os.listdir(tmp_path)) == ["file", "recs.parquet.parts"]


def test_a_checkpoint_that_is_saved_again_is_another_one(tmp_path):
    """This holds even for the same weights in the same directory; only a copy counts as the same."""

    def save(run_dir):
        checkpoints = Checkpoints(run_dir, newest=None)
        state = {"weights": small.batch(small.config(), 4, 0)["ids"]}
        checkpoints._manager.save(
            3,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave({})
            ),
        )
        checkpoints.wait()
        found = checkpoints.fingerprint(3)
        checkpoints.close()
        return found

    first = save(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copied = Checkpoints(tmp_path / "copy", newest=None)
    assert copied.fingerprint(3) == first
    copied.close()
    shutil.rmtree(tmp_path / "run")
    assert len({first, save(tmp_path / "run"), save(tmp_path / "other")}) == 3


def user_type(directory: Path, *types):
    for n, kind in enumerate(types):
        rows = [{"item_id": [[1]], "uid": 1 if pa.types.is_integer(kind) else "a"}]
        kinds = {"item_id": pa.list_(pa.list_(pa.int64())), "uid": kind}
        write_log(directory / f"{n}.orc", rows, kinds)
    config = Config(
        io=IOConfig(data_paths=str(directory)),
        features=(FeatureConfig(name="item_id", hash_bucket_size=9),),
    )
    return recommend._user_column(of_config.index(config), "uid").type


def test_users_have_a_type_that_holds_those_of_all_files(tmp_path):
    assert user_type(tmp_path / "a", pa.int32(), pa.int64(), pa.int16()) == pa.int64()
    assert user_type(tmp_path / "b", pa.string(), pa.string()) == pa.string()
    with pytest.raises(UserError) as caught:
        user_type(tmp_path / "c", pa.int32(), pa.string())
    message = str(caught.value)
    assert message.startswith("--user_column: column uid holds string in ")
    assert "1.orc" in message
    assert "0.orc" in message


def test_two_processes_do_not_write_one_output(tmp_path):
    parts = Parts(tmp_path / "recs.parquet", MADE_FOR)
    with pytest.raises(UserError, match=r"--output: another process is writing .*recs.parquet"):
        Parts(tmp_path / "recs.parquet", MADE_FOR)
    parts.close()
    Parts(tmp_path / "recs.parquet", MADE_FOR)
