"""The ids, rows and keys that docs/howto/other_servers.md shows, against our code and others'."""

import ast
import re
import struct
from typing import NamedTuple

import farmhash
import numpy as np
import pyarrow as pa
import pytest
from murmur import reference
from places import REPO

from s2s_serve.encoding import ids
from s2s_serve.encoding.feature import FeatureConfig
from s2s_serve.encoding.id_keys import keys_of
from s2s_serve.encoding.table_layout import row_of_bucket

PAGE = (REPO / "docs" / "howto" / "other_servers.md").read_text()
BUCKETS = 1000
REFERENCES = {"murmur": reference, "farm": farmhash.fingerprint64}
RESERVED, REPLACEMENT = 2**64 - 1, 0xD6E8FEB86659FD93


class Shown(NamedTuple):
    """A row of the table."""

    entry: int | str
    hash_type: str | None
    number: int
    bucket: int
    row: int
    key: int


def shown():
    pattern = re.compile(r"^\| `(.+)` \| (null|\w+)" + r" \| (\d+)" * 4 + r" \|$", re.MULTILINE)
    found = []
    for entry, hash_type, *numbers in pattern.findall(PAGE):
        hashed = None if hash_type == "null" else hash_type
        found.append(Shown(ast.literal_eval(entry), hashed, *map(int, numbers)))
    return found


@pytest.fixture(scope="module")
def of_page():
    """The functions that the page shows."""
    (code,) = re.findall(r"^```python\n(MASK = .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code, names)
    return names


def test_the_table_has_all_kinds_of_entries():
    rows = shown()
    assert len(rows) == len(
        re.findall(r"^\| `\S.*` \| (?:null|murmur|farm) \|", PAGE, re.MULTILINE)
    )
    assert {(type(each.entry), each.hash_type) for each in rows} == {
        (int, None),
        *((kind, hash_type) for kind in (int, str) for hash_type in REFERENCES),
    }
    # Fingerprint64 has a case for each of these lengths.
    sizes = {len(each.entry.encode()) for each in rows if isinstance(each.entry, str)}
    for low, high in ((0, 0), (1, 3), (4, 16), (33, 64), (65, 100)):
        assert any(low <= size <= high for size in sizes), (low, high)


@pytest.mark.parametrize("each", shown(), ids=str)
def test_what_the_page_shows_is_what_others_compute(each, of_page):
    if each.hash_type is None:
        number = each.entry % 2**64
        wide = REPLACEMENT if number == RESERVED else number
    else:
        text = isinstance(each.entry, str)
        data = each.entry.encode() if text else struct.pack("<q", each.entry)
        number = REFERENCES[each.hash_type](data)
        wide = number % 2**63
    assert each.number == number
    assert each.bucket == number % BUCKETS
    assert each.row == of_page["row"](each.bucket, -(-BUCKETS // 256))
    assert each.key == of_page["key"](wide)


@pytest.mark.parametrize("each", shown(), ids=str)
def test_what_the_page_shows_is_what_we_compute(each):
    entries = pa.array([each.entry])
    buckets = FeatureConfig(name="a", hash_type=each.hash_type, hash_bucket_size=BUCKETS)
    assert ids.to_buckets(entries, buckets).tolist() == [each.bucket]
    assert row_of_bucket(each.bucket, -(-BUCKETS // 256)) == each.row
    growing = FeatureConfig(name="a", hash_type=each.hash_type, hash_bucket_size=0)
    ((low, high),) = ids.to_words(entries, growing).view(np.uint32)
    first, second = (int(word[0]) for word in keys_of(low[None], high[None]))
    assert first << 32 | second == each.key


def test_the_function_of_the_page_gives_our_keys(of_page):
    some = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    some[:4] = 0, 1, 2**32 - 1, 2**64 - 1
    words = some.astype("<u8").view(np.uint32).reshape(-1, 2)
    first, second = keys_of(words[:, 0], words[:, 1])
    ours = first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)
    assert [of_page["key"](int(id)) for id in some] == ours.tolist()
