from pathlib import Path

import pyarrow as pa
import pyarrow.orc
import pytest
from logs import write_log
from places import DATA

from s2s_jax.data.logs import files, orc
from s2s_jax.errors import UserError


def make_rows(count: int) -> list[dict]:
    return [
        {"user_id": i, "item_id": [[i * 1000 + p] for p in range(i % 5)], "tag": f"user {i}"}
        for i in range(count)
    ]


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# ----------------------------------------------------------------------------------------- files


def test_a_directory_gives_its_orc_files_sorted(tmp_path):
    wanted = [tmp_path / "a.orc", tmp_path / "b" / "c.orc", tmp_path / "z.orc"]
    touch(*reversed(wanted), tmp_path / "README.md", tmp_path / ".hidden.orc", tmp_path / "_x.orc")
    assert files.find_files(str(tmp_path)) == wanted


def test_a_directory_without_orc_names_gives_all_that_is_not_hidden(tmp_path):
    touch(
        tmp_path / "part-00001", tmp_path / "part-00000", tmp_path / "_SUCCESS", tmp_path / ".crc"
    )
    assert files.find_files(str(tmp_path)) == [tmp_path / "part-00000", tmp_path / "part-00001"]


def test_hidden_directories_are_passed_over(tmp_path):
    """Spark and others keep unfinished files there; reading them would count rows double."""
    touch(tmp_path / "a.orc", tmp_path / "_temporary" / "0" / "b.orc", tmp_path / ".x" / "c.orc")
    assert files.find_files(str(tmp_path)) == [tmp_path / "a.orc"]
    touch(tmp_path / "_named" / "d.orc")
    named = files.find_files(str(tmp_path / "_named"))
    assert named == [tmp_path / "_named" / "d.orc"], "what is named itself is read"


def test_lists_keep_their_order(tmp_path):
    touch(
        tmp_path / "b.orc", tmp_path / "a.txt", tmp_path / "d" / "y.orc", tmp_path / "d" / "x.orc"
    )
    named = f" {tmp_path / 'b.orc'} ,{tmp_path / 'd'},, {tmp_path / 'a.txt'},"
    assert files.find_files(named) == [
        tmp_path / "b.orc",
        tmp_path / "d" / "x.orc",
        tmp_path / "d" / "y.orc",
        tmp_path / "a.txt",
    ]


def test_what_cannot_be_found_is_refused(tmp_path):
    touch(tmp_path / "d" / "a.orc", tmp_path / "empty" / ".hidden")
    assert "found none" in refusal(files.find_files, " , ")
    assert f"{tmp_path / 'no.orc'} does not exist" in refusal(
        files.find_files, f"{tmp_path / 'd'},{tmp_path / 'no.orc'}"
    )
    assert f"{tmp_path / 'empty'} holds no ORC files" in refusal(
        files.find_files, str(tmp_path / "empty")
    )


def test_a_file_named_twice_is_refused(tmp_path):
    touch(tmp_path / "d" / "a.orc")
    (tmp_path / "link.orc").symlink_to(tmp_path / "d" / "a.orc")
    for twice in (tmp_path / "d" / "a.orc", tmp_path / "d" / ".." / "d", tmp_path / "link.orc"):
        message = refusal(files.find_files, f"{tmp_path / 'd'},{twice}")
        assert "named twice" in message


# ---------------------------------------------------------------------------- footers and stripes


def test_stripes_and_their_rows(tmp_path):
    rows = make_rows(53)
    path = write_log(tmp_path / "a.orc", rows, stripe_rows=10)
    file = orc.read_footer(path)
    assert file.path == path
    assert file.size == len(path.read_bytes())
    assert file.stripe_rows == (10, 10, 10, 10, 10, 3)
    assert file.rows == 53
    assert file.schema.names == ["user_id", "item_id", "tag"]
    for columns in (["user_id", "item_id", "tag"], ["item_id"], ["tag", "user_id"]):
        found = []
        for stripe in range(6):
            batch = orc.read_stripe(file, stripe, columns)
            assert sorted(batch.schema.names) == sorted(columns)
            assert batch.num_rows == file.stripe_rows[stripe]
            found += batch.to_pylist()
        assert found == [{name: row[name] for name in columns} for row in rows]


def test_many_stripes_of_large_numbers_of_rows(tmp_path):
    # Row counts that take one, two and three bytes in the footer.
    path = tmp_path / "a.orc"
    sizes = [1, 127, 128, 16_383, 16_384, 20_000]
    with pyarrow.orc.ORCWriter(
        str(path), stripe_size=1, batch_size=20_000, compression="uncompressed"
    ) as writer:
        for size in sizes:
            writer.write(pa.table({"a": pa.array(range(size))}))
    file = orc.read_footer(path)
    assert sum(file.stripe_rows) == sum(sizes)
    with pa.OSFile(str(path)) as source:
        reader = pyarrow.orc.ORCFile(source)
        assert file.stripe_rows == tuple(
            reader.read_stripe(i).num_rows for i in range(reader.nstripes)
        )
    assert len(file.stripe_rows) >= 3


def test_a_file_without_rows(tmp_path):
    types = {"item_id": pa.list_(pa.list_(pa.int64()))}
    file = orc.read_footer(write_log(tmp_path / "a.orc", [], types))
    assert (file.rows, file.stripe_rows) == (0, ())
    assert file.schema.names == ["item_id"]


@pytest.mark.parametrize("compression", ["uncompressed", "zstd"])
def test_truncated_files_are_refused(tmp_path, compression):
    path = write_log(tmp_path / "a.orc", make_rows(40), compression=compression)
    whole = path.read_bytes()
    for kept in [1, 3, len(whole) // 2, *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:kept])
        assert str(path) in refusal(orc.read_footer, path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.orc"
    for content in (b"ORC", b"user,item\n1,2\n" * 100, bytes(1000), b"\xff" * 1000):
        path.write_bytes(content)
        assert str(path) in refusal(orc.read_footer, path)
    assert str(tmp_path) in refusal(orc.read_footer, tmp_path)
    assert str(tmp_path / "no.orc") in refusal(orc.read_footer, tmp_path / "no.orc")


def test_a_damaged_stripe_is_refused(tmp_path):
    rows = [{"item_id": [[(i * 7919 + p) ** 2 % 99_991] for p in range(20)]} for i in range(400)]
    path = write_log(tmp_path / "a.orc", rows, compression="zstd")
    file = orc.read_footer(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xa5" * 200
    path.write_bytes(content)
    message = refusal(orc.read_stripe, file, 0, ["item_id"])
    assert message.startswith(f"{path}: stripe 0 cannot be read")


def test_a_file_that_changes_is_refused(tmp_path):
    path = write_log(tmp_path / "a.orc", make_rows(30), stripe_rows=10)
    file = orc.read_footer(path)
    write_log(path, make_rows(30), stripe_rows=15)
    message = refusal(orc.read_stripe, file, 1, ["item_id"])
    assert message.startswith(f"{path}: stripe 1 has 15 rows, expected 10")
    assert f"{path}: stripe 2 cannot be read" in refusal(orc.read_stripe, file, 2, ["item_id"])
    write_log(path, [{"other": 1}] * 10)
    assert f"{path}: stripe 0 cannot be read" in refusal(orc.read_stripe, file, 0, ["item_id"])
    path.unlink()
    assert f"{path}: cannot be opened" in refusal(orc.read_stripe, file, 0, ["item_id"])


@pytest.mark.parametrize("compression", ["uncompressed", "zstd"])
def test_a_damaged_footer_is_read_or_refused(tmp_path, compression):
    # ORC has no checksums, so damage may go unnoticed; but it never raises another exception, not even
    # later when the names of the columns are used.
    path = write_log(tmp_path / "a.orc", make_rows(40), compression=compression)
    whole = path.read_bytes()
    with pa.OSFile(str(path)) as source:
        begin = pyarrow.orc.ORCFile(source).content_length
    refused = 0
    for position in range(begin, len(whole)):
        for mask in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            try:
                file = orc.read_footer(path)
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017
                refused += 1
            else:
                assert isinstance(file.schema.names, list)
                assert "user" in str(file.schema) or "item" in str(file.schema)
                assert all(rows >= 0 for rows in file.stripe_rows)
    assert refused > (len(whole) - begin) // 4


def test_column_names_that_are_no_utf8_are_refused(tmp_path):
    path = write_log(tmp_path / "a.orc", make_rows(4))
    path.write_bytes(path.read_bytes().replace(b"user_id", b"user\xffid"))
    assert str(path) in refusal(orc.read_footer, path)


# ----------------------------------------------------------------------------- files of others


@pytest.mark.skipif(
    not (DATA / "orc_foreign").is_dir(), reason=f"no ORC files of other writers in {DATA}"
)
def test_files_of_other_writers_are_read_or_refused():
    paths = sorted((DATA / "orc_foreign").glob("*.orc"))
    read = 0
    for path in paths:
        try:
            with pa.OSFile(str(path)) as source:
                reader = pyarrow.orc.ORCFile(source)
                expected = reader.nrows if reader.schema is not None else None
        except (pa.ArrowException, OSError, ValueError):
            # A file of 0 bytes, which Hive may write, has no rows.
            expected = 0 if path.stat().st_size == 0 else None
        try:
            file = orc.read_footer(path)
        except UserError as error:
            assert expected is None, path
            assert str(path) in str(error)  # noqa: PT017
            continue
        assert file.rows == expected, path
        try:
            for stripe in range(len(file.stripe_rows)):
                batch = orc.read_stripe(file, stripe, file.schema.names)
                assert batch.schema.names == file.schema.names
        except UserError as error:
            assert f"{path}: stripe" in str(error)  # noqa: PT017
            continue
        read += 1
    assert read > len(paths) * 0.8
