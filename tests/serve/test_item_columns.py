"""Columns of items as other libraries write them are filtered, or refused in one sentence."""

import datetime
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import s2s_serve
from s2s_jax.errors import UserError
from s2s_jax.exporting.item_columns import read_files
from s2s_jax.jobs.export import Request, export
from s2s_serve.manifest import checksum_of
from s2s_serve.versions import sha256_of

ITEMS = [f"item {n}" for n in range(40)]
KINDS = [f"kind {n % 3}" for n in range(40)]
TAGS = [[f"tag {n % 4}", f"tag {n % 5}"] if n % 7 else None for n in range(40)]
DAYS = [datetime.date(2020, 1, 1 + n % 4) for n in range(40)]
NOON = datetime.datetime(2020, 1, 1, 12)


def encoded(lists):
    """Lists whose values are a dictionary."""
    array = pa.array(lists, pa.list_(pa.string()))
    return pa.ListArray.from_arrays(
        array.offsets, array.values.dictionary_encode(), mask=array.is_null()
    )


WRITTEN = {
    "plain": pa.array(KINDS),
    "dictionary": pa.array(KINDS).dictionary_encode(),
    "view": pa.array(KINDS, pa.string_view()),
    "large": pa.array(KINDS, pa.large_string()),
}
LISTS = {
    "list": pa.array(TAGS),
    "large_list": pa.array(TAGS, pa.large_list(pa.large_string())),
    "list_view": pa.array(TAGS, pa.list_view(pa.string())),
    "list_of_views": pa.array(TAGS, pa.list_(pa.string_view())),
    "list_of_dictionary": encoded(TAGS),
}


@pytest.fixture(scope="module")
def model(small_export, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("columns")
    days = {
        "day": pa.array(DAYS, pa.date32()),
        "time": pa.array([NOON] * 40, pa.timestamp("ns", "UTC")),
    }
    # In another order than the items, and in several parts with dictionaries of their own.
    table = pa.table({"item": pa.array(ITEMS, pa.string_view()), **WRITTEN, **LISTS, **days})
    parts = [table.slice(n, 10) for n in (30, 0, 20, 10)]
    pq.write_table(pa.concat_tables(parts), tmp / "columns.parquet", row_group_size=10)
    request = Request(output=tmp / "export", item_columns=tmp / "columns.parquet", index="no")
    export(small_export.config, request)
    return s2s_serve.load(tmp / "export")


def left(model, **where):
    (answer,) = model.recommend([{name: [] for name in model.features}], k=40, where=where)
    return set(answer.items)


@pytest.mark.parametrize("name", WRITTEN)
def test_text_of_all_types_is_filtered(model, name):
    expected = {item for item, kind in zip(ITEMS, KINDS, strict=True) if kind != "kind 1"}
    assert left(model, **{name: ["kind 0", "kind 2"]}) == expected
    assert model.items.schema.field(name).type == pa.string()


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_all_types_are_filtered(model, name):
    expected = {item for item, tags in zip(ITEMS, TAGS, strict=True) if "tag 3" in (tags or ())}
    assert left(model, **{name: ["tag 3"]}) == expected
    assert model.items.schema.field(name).type.equals(pa.list_(pa.string()))


def test_times_may_be_text(model):
    expected = {item for item, day in zip(ITEMS, DAYS, strict=True) if day.day == 2}
    assert left(model, day=["2020-01-02"]) == left(model, day=[DAYS[1]]) == expected
    for text in ("2020-01-01T12:00:00", "2020-01-01T12:00:00Z", "2020-01-01T13:00:00+01:00"):
        assert left(model, time=[text]) == set(ITEMS)
    assert left(model, time=["2020-01-01T13:00:00"]) == set()
    with pytest.raises(UserError, match=r"where: day: expected values of type date32"):
        left(model, day=["noon"])


def test_an_export_of_before_with_large_lists_is_filtered(small_export, tmp_path):
    shutil.copytree(small_export.directory, tmp_path / "export")
    version = next((tmp_path / "export/versions").iterdir())
    table = pq.read_table(version / "items.parquet")
    place = table.column_names.index("genre")
    table = table.set_column(place, "genre", table["genre"].cast(pa.large_list(pa.string())))
    pq.write_table(table, version / "items.parquet")
    manifest = json.loads((version / "manifest.json").read_text())
    file = version / "items.parquet"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    manifest["checksum"] = checksum_of(manifest)
    (version / "manifest.json").write_text(json.dumps(manifest))
    model = s2s_serve.load(tmp_path / "export")
    assert pa.types.is_large_list(model.items.schema.field("genre").type)
    assert left(model, genre=["odd"]) == set(ITEMS[1::2])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            pa.array([{"a": 1}] * 2),
            "expected numbers, text, times, or lists of these, found struct",
        ),
        (pa.array([[{"a": 1}]] * 2), "expected numbers, .* found struct"),
        (
            pa.array(np.array([1, 1001], "datetime64[ns]")),
            r"expected values that fit timestamp\[us\]",
        ),
        (pa.array([0, 2**22], pa.date32()), "expected times of the years 1 to 9999"),
    ],
)
def test_columns_that_no_answer_can_hold_are_refused(tmp_path, values, words):
    path = tmp_path / "columns.parquet"
    pq.write_table(pa.table({"item": ["item 1", "item 2"], "more": values}), path)
    with pytest.raises(UserError, match=rf"--item_columns: .*column more: {words}"):
        read_files(None, path)
