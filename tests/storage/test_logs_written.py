"""Logs that `s2s convert` and `s2s synthesize` write to a store."""

import errno
import os
import signal
from pathlib import Path

import pyarrow.orc
import pytest
from conversions import events, write_csv

from s2s_jax.cli.main import main
from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings
from s2s_jax.data.logs import log_directory, orc_writer
from s2s_jax.errors import MachineError, UserError
from s2s_jax.storage import lock
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import StorePath

pytestmark = pytest.mark.usefixtures("copies")


@pytest.fixture
def source(tmp_path) -> Path:
    users = [n % 7 for n in range(60)]
    return write_csv(tmp_path / "a.csv", events(user_id=users, item_id=[*range(60)]))


def names_in(directory: StorePath) -> list[str]:
    found = file_systems.files_below(directory) or []
    return sorted("/".join(file.path.parts_below(directory)) for file in found)


def written(source: Path, output: Path | StorePath, **changes) -> list[bytes]:
    done = convert(Settings(paths=(str(source),), output=output, **changes))
    assert [path.parent for path in done.paths] == [output] * len(done.paths)
    return [path.read_bytes() for path in done.paths]


def test_the_files_are_those_of_a_disk(any_store, tmp_path, source, copies):
    on_disk = written(source, tmp_path / "log", events_per_file=25)
    assert len(on_disk) == 3
    assert written(source, any_store / "log", events_per_file=25) == on_disk
    assert names_in(any_store) == ["log/part-0.orc", "log/part-1.orc", "log/part-2.orc"]
    assert list(copies.iterdir()) == []


def test_an_earlier_log_is_replaced_only_if_that_is_wanted(any_store, source):
    first = written(source, any_store, events_per_file=25)
    with pytest.raises(
        UserError, match=r"--output: .*://.* already holds part-0\.orc.*--overwrite"
    ):
        written(source, any_store)
    assert [(any_store / f"part-{n}.orc").read_bytes() for n in range(3)] == first
    # What a killed process left; other files stay.
    (any_store / ".part-7.orc").write_bytes(b"unfinished")
    (any_store / "titles.csv").write_text("item_id,title\n")
    (whole,) = written(source, any_store, overwrite=True)
    assert names_in(any_store) == ["part-0.orc", "titles.csv"]
    assert whole not in first
    (any_store / "x/other.orc").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"--output: .* holds x/other\.orc, which new files would mix"
    ):
        written(source, any_store, overwrite=True)
    with pytest.raises(UserError, match=r"expected a directory, found the file .*part-0\.orc"):
        written(source, any_store / "part-0.orc")
    assert names_in(any_store) == ["part-0.orc", "titles.csv", "x/other.orc"]


def test_commands_write_there_and_read_from_there(of_s3, tmp_path, source, capsys):
    address = f"{of_s3}/log"
    assert main(["convert", str(source), "--output", address]) == 0
    out = capsys.readouterr().out
    assert f"60 events to {address}" in out
    assert f"s2s inspect {address}" in out
    with pytest.raises(UserError, match="--overwrite True"):
        main(["convert", str(source), "--output", address, "--temp_dir", str(tmp_path)])
    assert main(["inspect", address]) == 0
    assert str(of_s3) in capsys.readouterr().out
    shop = ["synthesize", "--users", "20", "--items", "80", "--output"]
    assert main([*shop, f"{of_s3}/shop"]) == 0
    assert f"to {of_s3}/shop" in capsys.readouterr().out
    assert main([*shop, str(tmp_path / "shop")]) == 0
    names = names_in(of_s3 / "shop")
    assert names == sorted(path.name for path in (tmp_path / "shop").iterdir())
    assert len(names) == 5
    for name in names:
        assert (of_s3 / "shop" / name).read_bytes() == (tmp_path / "shop" / name).read_bytes()
    with pytest.raises(UserError, match="--overwrite True"):
        main([*shop, f"{of_s3}/shop"])


def test_a_log_is_rewritten_from_disk_to_store(of_s3, tmp_path, source):
    written(source, tmp_path / "log", events_per_file=25)
    (data,) = written(tmp_path / "log", of_s3)
    table = pyarrow.orc.ORCFile(pyarrow.BufferReader(data)).read()
    on_disk = [pyarrow.orc.read_table(p) for p in sorted((tmp_path / "log").iterdir())]
    assert table.equals(pyarrow.concat_tables(on_disk))


def test_two_programs_do_not_write_one_log(of_s3, source, monkeypatch):
    with orc_writer.open_log(of_s3, overwrite=False) as log:
        log.write(pyarrow.table({"user_id": [1]}))
        # The same process runs, so there is nothing to wait for but its next beat.
        monkeypatch.setattr(lock.StoreLock, "_wait_until_free", told_that_it_is_in_use)
        with pytest.raises(UserError, match="another program is writing a log to s3://"):
            written(source, of_s3)
    assert names_in(of_s3) == ["part-0.orc"]


def told_that_it_is_in_use(taken: lock.StoreLock, _check: object) -> None:
    if lock._read(taken._path) is not None:
        raise UserError(taken._in_use)


@pytest.mark.slow
def test_a_store_that_is_away_leaves_the_earlier_log(of_s3, source, proxy, monkeypatch, copies):
    monkeypatch.setattr(file_systems, "_ATTEMPTS", 1)
    monkeypatch.setattr(lock, "_RELEASED", 0.2)
    first = written(source, of_s3)
    upload = file_systems.upload

    def away_from_now_on(file: Path, path: StorePath) -> None:
        proxy.failing, proxy.kinds = 1.0, ("503",)
        file_systems._connected.cache_clear()
        upload(file, path)

    monkeypatch.setattr(file_systems, "upload", away_from_now_on)
    with pytest.raises(MachineError, match=r"\.part-0\.orc: the store does not take it"):
        written(source, of_s3, overwrite=True)
    proxy.failing = 0.0
    file_systems._connected.cache_clear()
    monkeypatch.setattr(file_systems, "upload", upload)
    assert [(of_s3 / "part-0.orc").read_bytes()] == first
    assert list(copies.iterdir()) == []
    (of_s3 / ".lock").unlink(missing_ok=True)
    assert written(source, of_s3, overwrite=True) == first
    assert names_in(of_s3) == ["part-0.orc"]


@pytest.mark.slow
def test_faults_of_the_store_change_nothing(of_s3, source, proxy, tmp_path):
    on_disk = written(source, tmp_path / "log", events_per_file=6)
    # (Half of an answer is an answer to a request that writes.)
    proxy.failing, proxy.kinds = 0.2, ("503", "cut")
    done = convert(Settings(paths=(str(source),), output=of_s3, events_per_file=6))
    proxy.failing = 0.0
    assert proxy.faults > 3
    assert [path.read_bytes() for path in done.paths] == on_disk
    assert names_in(of_s3) == sorted(path.name for path in (tmp_path / "log").iterdir())


def test_a_part_of_a_log_is_never_left(of_s3, source, monkeypatch):
    move = file_systems.move

    def only_one(path: StorePath, target: StorePath) -> None:
        if target.name != "part-0.orc":
            raise MachineError(f"{target}: the store does not take it")
        move(path, target)

    monkeypatch.setattr(file_systems, "move", only_one)
    with pytest.raises(MachineError, match=r"part-1\.orc"):
        written(source, of_s3, events_per_file=25)
    assert names_in(of_s3) == []


def test_a_signal_while_files_get_their_names(of_s3, source, monkeypatch):
    written(source, of_s3)
    move = file_systems.move

    def slow(path: StorePath, target: StorePath) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        move(path, target)

    class Told(BaseException):
        pass

    def raise_it(*_: object) -> None:
        raise Told

    monkeypatch.setattr(file_systems, "move", slow)
    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        with pytest.raises(Told):
            written(source, of_s3, overwrite=True, events_per_file=25)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert names_in(of_s3) == ["part-0.orc", "part-1.orc", "part-2.orc"]


def test_a_signal_before_leaves_nothing(of_s3, source, monkeypatch, copies):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(log_directory._InStore, "show", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(source, of_s3)
    assert names_in(of_s3) == []
    assert list(copies.iterdir()) == []


def test_a_lost_lock_is_noticed_before_names_are_given(of_s3, source, monkeypatch):
    upload = file_systems.upload

    def taken_over(file: Path, path: StorePath) -> None:
        upload(file, path)
        (of_s3 / ".lock").write_text("{}")

    monkeypatch.setattr(file_systems, "upload", taken_over)
    with pytest.raises(UserError, match=r"another program is writing .*it took over"):
        written(source, of_s3)
    assert names_in(of_s3) == [".lock"]


def test_what_s3_cannot_rename_is_refused(of_s3, source, monkeypatch):
    monkeypatch.setattr(log_directory, "_LARGEST_OF_S3", 100)
    with pytest.raises(UserError, match=r"part-0\.orc has .* GiB.*lower --events_per_file"):
        written(source, of_s3)
    assert names_in(of_s3) == []


@pytest.mark.parametrize("given", [True, False])
def test_a_full_disk_is_named_by_its_flag(of_s3, source, monkeypatch, tmp_path, copies, given):
    class Full(orc_writer._Sink):
        def write(self, data: object) -> int:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            return memoryview(data).cast("B").nbytes

    monkeypatch.setattr(orc_writer, "_Sink", Full)
    flag, where = ("--temp_dir", tmp_path) if given else ("TMPDIR", copies)
    with pytest.raises(UserError, match=f"^{flag}: {where} cannot be written .*No space left"):
        written(source, of_s3, temp_dir=where if given else None)
    assert names_in(of_s3) == []


def test_no_credentials_are_needed_to_be_told_of_a_mistake(of_s3):
    with pytest.raises(UserError, match=r"FILE_OR_DIR|never\.csv does not exist"):
        written(Path("never.csv"), of_s3)
    assert names_in(of_s3) == []
