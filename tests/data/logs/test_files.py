"""Finding the files of a log: links, files of 0 bytes, files left out, commas in names."""

from pathlib import Path

import of_config
import pytest
from logs import write_log

from s2s_jax.cli.commands.inspect import main as inspect
from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.logs import files
from s2s_jax.errors import UserError

ROWS = [{"item_id": [1, 2, 3]}, {"item_id": [4, 5]}]


def config(path: object) -> Config:
    return Config(
        io=IOConfig(data_paths=str(path)),
        features=(FeatureConfig(name="item_id", hash_bucket_size=10),),
        model=ModelConfig(seq_len=4),
    )


def rows_of(path: object) -> int:
    return sum(of_config.index(config(path)).stripe_rows)


def test_linked_directories_are_read_but_no_circles(tmp_path):
    elsewhere = write_log(tmp_path / "elsewhere" / "deep" / "b.orc", ROWS)
    write_log(tmp_path / "log" / "real" / "a.orc", ROWS)
    (tmp_path / "log" / "linked").symlink_to(tmp_path / "elsewhere")
    (elsewhere.parent / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "log" / "up").symlink_to(tmp_path)
    found = files.find([str(tmp_path / "log")])
    assert found.files == [
        tmp_path / "log" / "linked" / "deep" / "b.orc",
        tmp_path / "log" / "real" / "a.orc",
    ]
    assert len(found.circles) == 2
    assert any("2 linked directories" in note for note in found.notes())
    assert rows_of(tmp_path / "log") == 4


def test_a_directory_that_is_linked_beside_itself_is_named_twice(tmp_path):
    write_log(tmp_path / "real" / "a.orc", ROWS)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=r"a\.orc is named twice \(also as .*count double"):
        files.find([str(tmp_path)])


def test_links_to_nowhere_are_refused(tmp_path):
    write_log(tmp_path / "a.orc", ROWS)
    (tmp_path / "b.orc").symlink_to(tmp_path / "gone.orc")
    (tmp_path / "c.orc").symlink_to(tmp_path / "c.orc")
    with pytest.raises(UserError, match=r"b\.orc: cannot be opened"):
        of_config.index(config(tmp_path))


def test_files_of_zero_bytes_have_no_rows(tmp_path, capsys):
    write_log(tmp_path / "000000_0", ROWS)
    (tmp_path / "000001_0").touch()
    index = of_config.index(config(tmp_path))
    assert sum(index.stripe_rows) == 2
    assert [note for note in index.notes if "000001_0" in note and "0 bytes" in note]
    assert inspect([str(tmp_path)]) == 0
    assert "0 bytes" in capsys.readouterr().out
    (tmp_path / "000000_0").write_bytes(b"")
    with pytest.raises(UserError, match="has no rows"):
        of_config.index(config(tmp_path))


def test_orc_files_left_out_by_name_are_reported(tmp_path, capsys):
    """Other files next to a log, such as a README, are not mentioned."""
    write_log(tmp_path / "000000_0", ROWS)
    (tmp_path / "README.md").write_text("a log")
    assert of_config.index(config(tmp_path / "000000_0")).notes == ()
    write_log(tmp_path / "extra.orc", ROWS)
    (note,) = of_config.index(config(tmp_path)).notes
    assert note.startswith(f"warning: 1 ORC file ({tmp_path / '000000_0'}) is left out")
    write_log(tmp_path / "_late.orc", ROWS)
    (note,) = of_config.index(config(tmp_path)).notes
    assert "2 ORC files" in note
    assert inspect([str(tmp_path)]) == 0
    assert "2 ORC files" in capsys.readouterr().out
    (note,) = of_config.index(config(f"{tmp_path},{tmp_path / '000000_0'}")).notes
    assert "_late.orc" in note
    assert "000000_0" not in note


@pytest.mark.parametrize("name", ["a,b.orc", "a,b", "x,,y", "end,"])
def test_paths_with_commas(tmp_path, name):
    path = write_log(tmp_path / name, ROWS)
    other = write_log(tmp_path / "other.orc", ROWS)
    assert files.find_files(str(path)) == [path]
    assert files.find_files(f"{other}, {path}") == [other, path]
    assert files.find_files(f"{path},{other}") == [path, other]
    assert inspect([str(path)]) == 0


def test_a_path_with_a_comma_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"no does not exist"):
        files.find_files(f"{tmp_path}/no,{tmp_path}/nor")


def test_what_may_not_be_looked_at_is_refused(tmp_path, monkeypatch):
    write_log(tmp_path / "a.orc", ROWS)
    (tmp_path / "locked").mkdir()

    def refuse(path, scandir=files.os.scandir):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refuse)
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be accessed .*Permission denied"):
        files.find([str(tmp_path)])
