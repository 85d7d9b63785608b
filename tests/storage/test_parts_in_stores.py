"""Recommendations in a store, and what several commands do to each other there."""

import contextlib

import pyarrow as pa
import pytest
import stores

from s2s_jax.errors import UserError
from s2s_jax.ranking.part_directory import PartDirectory, Share
from s2s_jax.ranking.parts import Parts
from s2s_jax.storage import lock
from s2s_serve.storage.address import place_of

MADE_FOR = {"checkpoint": 1}


@pytest.fixture
def top(proxy, request, monkeypatch):
    """A directory for each test, in which a lock is free at once."""
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    return place_of(f"s3://{stores.BUCKET}/parts/{request.node.name}")


def table(*values):
    return pa.table({"x": pa.array(values, pa.int64())})


@pytest.fixture
def open_one(top):
    """Opens directories, and releases their locks while the store still answers."""
    with contextlib.ExitStack() as opened:

        def opening(path, made_for=MADE_FOR, host=0, hosts=2):
            made = PartDirectory(path, made_for, [2, 2], Share(host, hosts))
            return opened.enter_context(contextlib.closing(made))

        yield opening


def test_an_address_is_not_both_a_file_and_a_directory(top, open_one):
    yesterday = top / "recs.parquet"
    yesterday.write_bytes(b"yesterday")
    with pytest.raises(UserError, match=r"expected a directory, found the file s3://.*recs\.parq"):
        open_one(yesterday)
    assert list(yesterday.iterdir()) == []
    Parts(yesterday, MADE_FOR).close()
    (top / "new.parquet" / "part-000000.parquet").write_bytes(b"of several processes")
    with pytest.raises(UserError, match=r"no file below s3://.*new\.parquet, found part-000000"):
        Parts(top / "new.parquet", MADE_FOR)
    assert not (top / "new.parquet").is_file()


def open_two_at_once(path, open_one, monkeypatch, between):
    """Two processes with different checkpoints, of which both have seen no note, and the later one
    writes its own after `between(first)`."""
    write_note = PartDirectory._write_note
    first = []

    def other_is_faster(self, note):
        monkeypatch.setattr(PartDirectory, "_write_note", write_note)
        first.append(open_one(path, {"checkpoint": 1}, 0))
        between(first[0])
        write_note(self, note)

    monkeypatch.setattr(PartDirectory, "_write_note", other_is_faster)
    second = open_one(path, {"checkpoint": 2}, 1)
    return first[0], second


def test_processes_that_begin_together_do_not_mix_two_checkpoints(top, open_one, monkeypatch):
    first, second = open_two_at_once(top, open_one, monkeypatch, lambda first: None)
    with pytest.raises(UserError, match="made with another checkpoint; give all processes"):
        first.write(0, table(1), {"users": 1})
    second.write(1, table(2), {"users": 1})
    assert second.join() is None
    assert [path.name for path in top.glob("part-*")] == ["part-000001.parquet"]


def test_a_part_that_was_written_before_the_note_changed_is_refused(top, open_one, monkeypatch):
    first, second = open_two_at_once(
        top, open_one, monkeypatch, lambda first: first.write(0, table(1), {"users": 1})
    )
    second.write(1, table(2), {"users": 1})
    with pytest.raises(UserError, match="made with another checkpoint"):
        first.join()
    wrong = r"part-000000\.parquet was made for something else; remove it and start again"
    with pytest.raises(UserError, match=wrong):
        second.join()
    first.close()
    with pytest.raises(UserError, match=wrong):
        open_one(top, {"checkpoint": 2}, 0).missing(2)
    assert not (top / "_SUCCESS").exists()
