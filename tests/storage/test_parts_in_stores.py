"""Recommendations in a store, and what several commands do to each other there."""

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


def open_one(path, made_for=MADE_FOR, host=0, hosts=2):
    return PartDirectory(path, made_for, [2, 2], Share(host, hosts))


def test_an_address_is_not_both_a_file_and_a_directory(top):
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
