"""ORC files of other writers (Java, Hive, Spark, Presto, C++, Iceberg), sound, odd and broken.

Every file is in one of the tables: it is read as pyarrow reads it as a whole, or refused with a message.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.orc
import pytest
import small
from logs import write_log
from places import DATA

from s2s_jax.cli.commands.inspect import main
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, FeatureConfig, IOConfig, ModelConfig
from s2s_jax.data.batching.dataset import HostBatch
from s2s_jax.data.logs import orc
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train

FOREIGN = DATA / "orc_foreign"
needs_files = pytest.mark.skipif(
    not FOREIGN.is_dir(), reason=f"no ORC files of other writers in {DATA}"
)

# Stripes and rows of files that are read.
READ = {
    "TestOrcFile.columnProjection.orc": (5, 21_000),
    "TestOrcFile.emptyFile.orc": (0, 0),
    "TestOrcFile.metaData.orc": (1, 1),
    "TestOrcFile.test1.orc": (1, 2),
    "TestOrcFile.testDate1900.orc": (8, 70_000),
    "TestOrcFile.testDate2038.orc": (28, 212_000),
    "TestOrcFile.testMemoryManagementV11.orc": (25, 2_500),
    "TestOrcFile.testMemoryManagementV12.orc": (4, 2_500),
    "TestOrcFile.testPredicatePushdown.orc": (1, 3_500),
    "TestOrcFile.testSargSkipPickupGroupWithoutIndexCPlusPlus.orc": (1, 10_000),
    "TestOrcFile.testSargSkipPickupGroupWithoutIndexJava.orc": (1, 10_000),
    "TestOrcFile.testSeek.orc": (7, 32_768),
    "TestOrcFile.testSnappy.orc": (2, 10_000),
    "TestOrcFile.testStringAndBinaryStatistics.orc": (1, 4),
    "TestOrcFile.testStripeLevelStats.orc": (3, 11_000),
    "TestOrcFile.testWithoutIndex.orc": (10, 50_000),
    "TestStringDictionary.testRowIndex.orc": (1, 32_768),
    "TestVectorOrcFile.testLz4.orc": (2, 10_000),
    "TestVectorOrcFile.testLzo.orc": (2, 10_000),
    "TestVectorOrcFile.testZstd.0.12.orc": (1, 10_000),
    "bad_bloom_filter_1.6.0.orc": (1, 5),
    "bad_bloom_filter_1.6.11.orc": (1, 5),
    "complextypes_iceberg.orc": (1, 1),
    "decimal.orc": (1, 6_000),
    "decimal64_v2.orc": (1, 10),
    "decimal64_v2_cplusplus.orc": (1, 10),
    "demo-11-zlib.orc": (385, 1_920_800),
    "demo-12-zlib.orc": (1, 1_920_800),
    "encrypted_sample1.orc": (1, 1),
    "javacore_col.dot.orc": (1, 1),
    "javacore_orc-file-11-format.orc": (2, 7_500),
    "javacore_orc-file-dst-no-timezone.orc": (1, 2),
    "javacore_orc-file-no-double-statistic.orc": (1, 1),
    "javacore_orc-file-no-timezone.orc": (1, 2),
    "javacore_orc-file-presto-string.orc": (1, 1),
    "javacore_orc_split_elim.orc": (1, 25_000),
    "javamr_acid5k.orc": (1, 5_000),
    "nulls-at-end-snappy.orc": (1, 70_000),
    "orc-file-11-format.orc": (2, 7_500),
    "orc_index_int_string.orc": (1, 6_000),
    "orc_split_elim.orc": (5, 25_000),
    "orc_split_elim_cpp.orc": (1, 25_000),
    "orc_split_elim_new.orc": (1, 25_000),
    "orcrust_alltypes.lz4.orc": (1, 11),
    "orcrust_alltypes.lzo.orc": (1, 11),
    "orcrust_alltypes.none.orc": (1, 11),
    "orcrust_alltypes.snappy.orc": (1, 11),
    "orcrust_alltypes.zlib.orc": (1, 11),
    "orcrust_alltypes.zstd.orc": (1, 11),
    "orcrust_nested_array.orc": (1, 5),
    "orcrust_nested_array_float.orc": (1, 2),
    "orcrust_nested_array_struct.orc": (1, 2),
    "orcrust_patched_int.orc": (1, 999_596),
    "orcrust_pyarrow_timestamps.orc": (1, 8),
    "orcrust_pyorc_rlev2_patchedbase.orc": (1, 31),
    "orcrust_string_dict_gzip.orc": (1, 64),
    "orcrust_string_long_long_gzip.orc": (1, 10_000),
    "orcrust_test.orc": (1, 5),
    "orcrust_test_bigint.orc": (1, 17_247),
    "over1k_bloom.orc": (2, 2_098),
    "version1999.orc": (0, 0),
}
# Messages for files that cannot be read at all.
REFUSED_AT_FOOTER = {
    "TestOrcFile.testTimestamp.orc": "Only ORC files with a top-level struct can be handled",
    "TestOrcFile.testWithoutCompressionBlockSize.orc": (
        "Only ORC files with a top-level struct can be handled"
    ),
}
# Stripes, rows, and the message for each column that cannot be read, about the first stripe.
REFUSED_AT_STRIPE = {
    "corrupt_missing_blob_stream_in_string_dict.orc": (
        1, 7_300, {"string_col": "DICTIONARY_DATA stream not found in StringDictionaryColumn"},
    ),
    "corrupt_missing_length_stream_in_string_dict.orc": (
        1, 300, {
            "date_string_col": "LENGTH stream not found in StringDictionaryColumn",
            "string_col": "LENGTH stream not found in StringDictionaryColumn",
        },
    ),
    "orcrust_overflowing_timestamps.orc": (
        1, 3, {"timestamp": "is out of range for nanosecond resolution"},
    ),
    "orcrust_timestamps_0001.orc": (
        1, 1, {"c1": "is out of range for nanosecond resolution"},
    ),
}  # fmt: skip
# The columns that can be features, and the op that reads them. All others are refused.
FEATURES = {
    ("complextypes_iceberg.orc", "int_array"): "id",
    ("complextypes_iceberg.orc", "int_array_array"): "id",
    ("orcrust_nested_array.orc", "value"): "id",
    ("orcrust_nested_array_float.orc", "value"): "bucketize",
}
ENCRYPTED = {("encrypted_sample1.orc", "ssn"), ("encrypted_sample1.orc", "email")}
# Files with the same rows, by several writers, in several encodings and compressions.
SAME_ROWS = [
    [f"orcrust_alltypes.{kind}.orc" for kind in ("none", "lz4", "lzo", "snappy", "zlib", "zstd")],
    ["demo-11-zlib.orc", "demo-12-zlib.orc"],
    ["TestOrcFile.testMemoryManagementV11.orc", "TestOrcFile.testMemoryManagementV12.orc"],
    ["TestVectorOrcFile.testLz4.orc", "TestVectorOrcFile.testZstd.0.12.orc"],
]


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_config(data_paths: Any, feature: FeatureConfig, seq_len: int = 4, **io) -> Config:
    settings = {"thread_num": 0, "prefetch": 0, "shuffle": False} | io
    return Config(
        io=IOConfig(data_paths=str(data_paths), **settings),
        features=(feature,),
        model=ModelConfig(seq_len=seq_len),
    )


def make_feature(column: str, op: Any = "id") -> FeatureConfig:
    boundaries = (1.0, 1.5, 2.5) if op == "bucketize" else None
    return FeatureConfig(
        name="feature",
        column=column,
        op=op,
        boundaries=boundaries,
        hash_bucket_size=1000,
        bag_size=3,
    )


def read_whole(path: Path, columns: list[str] | None = None) -> pa.Table:
    return pyarrow.orc.ORCFile(str(path)).read(columns=columns)


def read_stripes(path: Path, columns: list[str]) -> pa.Table:
    file = orc.read_footer(path)
    batches = [orc.read_stripe(file, i, columns) for i in range(len(file.stripe_rows))]
    assert [batch.num_rows for batch in batches] == list(file.stripe_rows)
    return pa.Table.from_batches(batches, None if batches else file.schema)


def read_epoch(config: Config, batch_rows: int) -> list[HostBatch]:
    reader = of_config.reader(config, batch_rows)
    batches = list(itertools.islice(reader, reader.steps_per_epoch))
    reader.close()
    return batches


def in_plain_python(rows: list[Any], feature: FeatureConfig, seq_len: int) -> list[list[list[int]]]:
    """The ids of rows, padded."""
    result = []
    for row in rows:
        bags = [entry if isinstance(entry, list) else [entry] for entry in row or []]
        positions = []
        for bag in bags[-seq_len:]:
            known = [value for value in bag if value is not None and value == value]
            if feature.op == "bucketize":
                assert feature.boundaries is not None
                known = [sum(limit <= value for limit in feature.boundaries) for value in known]
            else:
                known = [value % 2**64 % feature.hash_bucket_size for value in known]
            positions.append(known + [-1] * (feature.bag_size - len(known)))
        result.append(positions + [[-1] * feature.bag_size] * (seq_len - len(positions)))
    return result


# ------------------------------------------------------------------------------------ the table


@needs_files
def test_every_file_stands_in_the_table():
    # zero.orc has no bytes and therefore no rows; see test_files.py.
    known = [*READ, *REFUSED_AT_FOOTER, *REFUSED_AT_STRIPE, "zero.orc"]
    assert sorted(path.name for path in FOREIGN.glob("*.orc")) == sorted(known)


@needs_files
@pytest.mark.parametrize("name", READ)
def test_stripes_are_read_as_pyarrow_reads_the_whole_file(name):
    file = orc.read_footer(FOREIGN / name)
    assert (len(file.stripe_rows), file.rows) == READ[name]
    whole = read_whole(file.path)
    assert (whole.num_rows, whole.schema) == (file.rows, file.schema)
    assert read_stripes(file.path, file.schema.names).equals(whole)


@needs_files
@pytest.mark.parametrize("names", SAME_ROWS)
def test_the_same_rows_of_several_writers(names):
    tables = [
        read_stripes(FOREIGN / name, orc.read_footer(FOREIGN / name).schema.names) for name in names
    ]
    assert all(table.equals(tables[0]) for table in tables)


@needs_files
@pytest.mark.parametrize("name", REFUSED_AT_FOOTER)
def test_what_is_no_log_is_refused_at_its_footer(name):
    path = FOREIGN / name
    message = f"{path}: expected an ORC file, but {REFUSED_AT_FOOTER[name]}"
    assert refusal(orc.read_footer, path) == message
    assert refusal(of_config.reader, make_config(path, make_feature("x")), 2) == message
    skipping = make_config(path, make_feature("x"), on_error="skip_stripe")
    assert refusal(of_config.reader, skipping, 2) == (
        f"io.data_paths: {path} has no rows; 1 files cannot be read: {message}"
    )


@needs_files
@pytest.mark.parametrize("name", REFUSED_AT_STRIPE)
def test_what_is_damaged_is_refused_at_its_stripe(name):
    stripes, rows, damaged = REFUSED_AT_STRIPE[name]
    file = orc.read_footer(FOREIGN / name)
    assert (len(file.stripe_rows), file.rows) == (stripes, rows)
    for column, words in damaged.items():
        message = refusal(orc.read_stripe, file, 0, [column])
        assert message.startswith(f"{file.path}: stripe 0 cannot be read (")
        assert words in message
        assert message.endswith("); rewrite the file or take it out of io.data_paths")
    assert refusal(orc.read_stripe, file, 0, file.schema.names).startswith(
        f"{file.path}: stripe 0 "
    )
    sound = [column for column in file.schema.names if column not in damaged]
    if sound:
        assert read_stripes(file.path, sound).equals(read_whole(file.path, sound))


@needs_files
@pytest.mark.parametrize("name", [*READ, *REFUSED_AT_STRIPE])
def test_every_column_becomes_batches_or_is_refused(name):
    file = orc.read_footer(FOREIGN / name)
    for column in file.schema.names:
        if (name, column) in FEATURES:
            feature = make_feature(column, FEATURES[name, column])
            batches = read_epoch(make_config(file.path, feature), 2)
            found = np.concatenate([batch.arrays["ids"] for batch in batches])[: file.rows]
            rows = read_whole(file.path)[column].to_pylist()
            assert found.tolist() == in_plain_python(rows, feature, 4)
            lengths = np.concatenate([batch.arrays["length"] for batch in batches])[: file.rows]
            assert lengths.tolist() == [min(len(row or []), 4) for row in rows]
            assert not any(batch.skipped for batch in batches)
            continue
        for op in ("id", "bucketize"):
            message = refusal(of_config.reader, make_config(file.path, make_feature(column, op)), 2)
            if file.rows == 0:
                assert message == f"io.data_paths: {file.path} has no rows"
            elif (name, column) in ENCRYPTED:
                assert message.startswith(
                    f"{file.path}: column {column} (features.0.column) is encr"
                )
            else:
                assert message.startswith(
                    f"{file.path}: column {column}: expected list<T> or list<"
                )
                assert f"found {file.schema.field(column).type}" in message
    message = refusal(of_config.reader, make_config(file.path, make_feature("no such column")), 2)
    assert "no rows" in message if file.rows == 0 else "no column no such column" in message


@needs_files
def test_lists_of_other_writers_become_the_ids_that_are_written_here():
    """Expected values were read from the files by eye."""
    path = FOREIGN / "orcrust_nested_array.orc"
    (batch,) = read_epoch(make_config(path, make_feature("value"), seq_len=3), 5)
    assert batch.arrays["length"].tolist() == [3, 3, 3, 0, 2]
    assert batch.arrays["ids"][..., 0].tolist() == [
        *([3, 43, 5], [32, 4, 15], [4, 5, 6], [-1, -1, -1], [3, -1, -1])
    ]
    path = FOREIGN / "complextypes_iceberg.orc"
    (batch,) = read_epoch(make_config(path, make_feature("int_array_array"), seq_len=2), 1)
    minus = [2**64 % 1000 - n for n in (1, 2)]
    assert batch.arrays["ids"].tolist() == [[[*minus, -1], [-1, -1, -1]]]
    path = FOREIGN / "orcrust_nested_array_float.orc"
    (batch,) = read_epoch(make_config(path, make_feature("value", "bucketize"), seq_len=2), 2)
    assert batch.arrays["ids"][..., 0].tolist() == [[1, 3], [-1, 2]]


@needs_files
def test_columns_inside_structs_are_pointed_at():
    """As in Hive's transactional tables."""
    path = FOREIGN / "javamr_acid5k.orc"
    assert refusal(of_config.reader, make_config(path, make_feature("i")), 2) == (
        f"{path}: no column i (features.0.column); it has operation, originalTransaction, bucket, "
        f"rowId, currentTransaction, row, and i inside struct row, where it cannot be read; write it as "
        f"a column of its own"
    )


# -------------------------------------------------------------------------------- odd columns


def varint(number: int) -> bytes:
    low = number & 0x7F
    return bytes([low]) if number < 0x80 else bytes([low | 0x80]) + varint(number >> 7)


def encrypt_in_footer(path: Path, root: int) -> None:
    """Writes into an uncompressed file's footer that type number `root` is encrypted."""
    content = path.read_bytes()
    postscript = content[-1 - content[-1] : -1]
    assert postscript[0] == 0x08, "the length of the footer comes first"
    length = postscript[1] & 0x7F | (postscript[2] << 7 if postscript[1] & 0x80 else 0)
    rest = postscript[3 if postscript[1] & 0x80 else 2 :]
    # Footer.encryption.variants.root
    added = bytes([0x52, 4 + (root > 0x7F), 0x1A, 2, 0x08]) + varint(root)
    postscript = b"\x08" + varint(length + len(added)) + rest
    body = content[: -1 - content[-1]]
    path.write_bytes(body + added + postscript + bytes([len(postscript)]))


# The root is type 0, item 1 to 3, user 4, tags 5 to 6.
@pytest.mark.parametrize(
    ("root", "names"),
    [(1, ["item"]), (3, ["item"]), (4, ["user"]), (6, ["tags"]), (0, ["item", "user", "tags"])],
)
def test_encrypted_columns_are_refused(tmp_path, root, names):
    """They would silently be read as their masks, for example nulls."""
    row = {"item": [[1]], "user": 7, "tags": ["a"]}
    path = write_log(tmp_path / "a.orc", [row])
    encrypt_in_footer(path, root)
    assert orc.read_footer(path).encrypted == set(names)
    for column in ("item", "tags"):
        feature = dataclasses.replace(make_feature(column), hash_type="murmur")
        if column in names:
            assert refusal(of_config.reader, make_config(path, feature), 1) == (
                f"{path}: column {column} (features.0.column) is encrypted and can only be read as its "
                f"mask; rewrite the file without encryption"
            )
        else:
            assert read_epoch(make_config(path, feature), 1)[0].arrays["length"].tolist() == [1]


def test_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.orc"
    lists = pa.array([[1], [2]])
    pyarrow.orc.write_table(pa.Table.from_arrays([lists, lists], names=["a", "a"]), str(path))
    message = refusal(of_config.reader, make_config(path, make_feature("a")), 2)
    assert message.startswith(f"{path}: 2 columns are called a (features.0.column)")


def test_names_with_dots_are_read_or_refused(tmp_path):
    row = {"item.id": [1, 2], "item": [3]}
    path = write_log(tmp_path / "a.orc", [row])
    (batch,) = read_epoch(make_config(path, make_feature("item.id"), seq_len=2), 1)
    assert batch.arrays["ids"][0, :, 0].tolist() == [1, 2]
    # pyarrow takes the name for the field of the struct.
    path = write_log(tmp_path / "a.orc", [row | {"item": {"id": [3]}}])
    message = refusal(read_epoch, make_config(path, make_feature("item.id")), 1)
    assert message.startswith(f"{path}: stripe 0 has no column item.id")


def test_the_columns_of_a_file_are_listed_in_one_line(tmp_path):
    path = write_log(tmp_path / "a.orc", [{"two\nlines": [1]}])
    message = refusal(of_config.reader, make_config(path, make_feature("x")), 1)
    assert message == f"{path}: no column x (features.0.column); it has two lines"


# ------------------------------------------------------------------------------- damaged logs


def damage_stripes(path: Path, *stripes: int) -> None:
    """Overwrites the footers of stripes, which begin with the places of their streams."""
    content = bytearray(path.read_bytes())
    # Each of them has the writer's time zone.
    places = [match.start() for match in re.finditer(rb"\x1a\x03GMT", content)]
    assert len(places) == len(orc.read_footer(path).stripe_rows)
    for stripe in stripes:
        content[places[stripe] - 8 : places[stripe] + 5] = b"\xff" * 13
    path.write_bytes(content)


@pytest.mark.parametrize("thread_num", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_damaged_stripes_are_skipped_and_counted(tmp_path, thread_num, shuffle):
    rows = [{"item": [n + 1] * (1 + n % 3)} for n in range(95)]
    write_log(tmp_path / "a.orc", rows[:50], stripe_rows=10)
    path = write_log(tmp_path / "b.orc", rows[50:], stripe_rows=10)
    damage_stripes(path, 1, 4)
    config = make_config(tmp_path, make_feature("item"), thread_num=thread_num, shuffle=shuffle)
    message = refusal(read_epoch, config, 7)
    assert re.match(rf"{re.escape(str(path))}: stripe [14] cannot be read", message)
    config = dataclasses.replace(config, io=dataclasses.replace(config.io, on_error="skip_stripe"))
    batches = read_epoch(config, 7)
    found = [
        row[0, 0] - 1
        for batch in batches
        for row, length in zip(batch.arrays["ids"], batch.arrays["length"], strict=True)
        if length > 0
    ]
    assert sorted(found) == [*range(60), *range(70, 90)]
    assert sum(batch.skipped_rows for batch in batches) == 15
    skipped = {one for batch in batches for one in batch.skipped}
    assert {(one.file, one.stripe, one.rows) for one in skipped} == {
        (str(path), 1, 10),
        (str(path), 4, 5),
    }


@needs_files
def test_files_of_other_writers_are_skipped_where_they_are_damaged(tmp_path):
    sound = FOREIGN / "complextypes_iceberg.orc"
    content = bytearray(sound.read_bytes())
    # The footer of the stripe, a zlib block.
    content[832:900] = b"\xff" * 68
    damaged = tmp_path / "damaged.orc"
    damaged.write_bytes(content)
    unreadable = [FOREIGN / name for name in REFUSED_AT_FOOTER]
    paths = ",".join(map(str, [*unreadable, damaged, sound]))
    config = make_config(paths, make_feature("int_array"), on_error="skip_stripe")
    reader = of_config.reader(config, 1)
    assert [(one.file, one.stripe) for one in reader.skipped_files] == [
        (str(path), None) for path in unreadable
    ]
    lost, read = itertools.islice(reader, 2)
    assert (lost.skipped_rows, lost.arrays["length"].tolist()) == (1, [-1])
    (skipped,) = lost.skipped
    assert skipped[:3] == (str(damaged), 0, 1)
    assert skipped.reason.startswith(f"{damaged}: stripe 0 cannot be read (bad StripeFooter")
    assert (read.skipped_rows, read.arrays["ids"][0, 0, 0]) == (0, (2**64 - 1) % 1000)
    config = make_config(paths, make_feature("int_array"))
    assert refusal(of_config.reader, config, 1).startswith(f"{unreadable[0]}: expected an ORC file")


def test_damaged_stripes_are_reported_and_the_others_are_shown(tmp_path, capsys):
    rows = [{"item": [n] * (1 + n % 3)} for n in range(50)]
    path = write_log(tmp_path / "a.orc", rows, stripe_rows=10)
    damage_stripes(path, 1, 4)
    assert main([str(path), "--rows", "0"]) == 2
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert [x.split(" cannot be read")[0] for x in errors] == [
        f"error: {path}: stripe {stripe}" for stripe in (1, 4)
    ]
    sound = rows[:10] + rows[20:40]
    positions = sum(len(row["item"]) for row in sound)
    assert "2 (40.0%)" in printed.out
    assert "Unreadable: 0 of 1 files, and 2 stripes of the others" in printed.out
    assert f"Rows: 30, with {positions} positions" in printed.out
    assert "Stripes: 5, of 10 / 10 / 10 rows" in printed.out


def test_a_run_passes_over_what_is_damaged_and_says_so(tmp_path, capsys):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    rows = [
        {"item_id": [[n % 300]] * 4, "behavior_id": [[n % 4]] * 4, "tags": [[n % 7]] * 4}
        for n in range(70)
    ]
    path = write_log(log / "a.orc", rows, stripe_rows=10)
    damage_stripes(path, 2, 5)
    (log / "b.orc").write_bytes(b"no ORC file")
    config = small.config()
    config = dataclasses.replace(
        config,
        io=IOConfig(data_paths=str(log), batch_size=8, on_error="skip_stripe"),
        model=dataclasses.replace(config.model, num_layers=1),
        train=dataclasses.replace(
            config.train,
            train_epoch=2,
            train_steps=None,
            log_steps=9,
            output_dir=str(run_dir),
            tensorboard=False,
        ),
    )
    assert not train(config, make_mesh(jax.devices()[:1]))
    written = [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]
    assert written[0] == {
        "file": str(log / "b.orc"),
        "stripe": None,
        "rows": None,
        "reason": f"{log / 'b.orc'}: expected an ORC file, but Not an ORC file",
    }
    # Each once, although both epochs skipped them.
    assert len(written) == 3
    assert {line["stripe"] for line in written[1:]} == {2, 5}
    for line in written[1:]:
        message = refusal(orc.read_stripe, orc.read_footer(path), line["stripe"], ["item_id"])
        assert (line["file"], line["rows"]) == (str(path), 10)
        beginning = message.split(" (")[0]
        assert line["reason"].startswith(beginning)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # 9 batches per epoch; each epoch loses 20 rows.
    assert [(line["step"], line["skipped_rows"]) for line in metrics] == [(9, 20), (18, 40)]
    printed = capsys.readouterr().err
    assert [x for x in printed.splitlines() if x.startswith("skipped: ")] == [
        f"skipped: {line['reason']}" for line in written
    ]
