import struct

import farmhash
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from murmur import reference

from s2s_serve.encoding.hashing import hash_integers, hash_strings, to_buckets, to_positive_ids

# pyfarmhash binds Google's C++.
REFERENCES = {"murmur": reference, "farm": farmhash.fingerprint64}


@pytest.fixture(params=list(REFERENCES))
def hash_type(request):
    return request.param


def expected(strings, hash_type) -> list[int]:
    hash_ = REFERENCES[hash_type]
    return [hash_(s.encode() if isinstance(s, str) else s) for s in strings]


def test_the_reference_is_murmurhash64a():
    # SMHasher's VerificationTest, with its published value for MurmurHash64A.
    hashes = b"".join(
        reference(bytes(range(i)), seed=256 - i).to_bytes(8, "little") for i in range(256)
    )
    assert reference(hashes) & 0xFFFFFFFF == 0x1F0D3804


def test_published_farm_fingerprints():
    # From the documentation of BigQuery's FARM_FINGERPRINT, which is signed.
    texts = pa.array(["1footrue", "3true"])
    found = hash_strings(texts, "farm").view(np.int64).tolist()
    assert found == [-1541654101129638711, -4880158226897771312]


@pytest.mark.parametrize("length", [*range(62, 70), *range(126, 132), 191, 192, 193, 1000, 70_000])
def test_long_strings(length, hash_type):
    rng = np.random.default_rng(length)
    texts = [rng.bytes(length), b"", rng.bytes(length + 1), rng.bytes(5)]
    assert hash_strings(pa.array(texts, pa.binary()), hash_type).tolist() == expected(
        texts, hash_type
    )


@pytest.mark.parametrize(
    "arrow_type", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str
)
def test_lengths_and_types(arrow_type, hash_type):
    letters = "The quick brown fox jumps over the lazy dog!"
    strings = ["", *(letters[:n] for n in range(1, 41)), "ü", "日本語のテキスト", "🦊" * 5, ""]
    values = strings if "string" in str(arrow_type) else [s.encode() for s in strings]
    array = pa.array(values, arrow_type)
    hashes = hash_strings(array, hash_type)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == expected(strings, hash_type)
    for start in (0, 1, 7, len(strings) - 1, len(strings)):
        for length in (0, 1, 5, 100):
            part = array.slice(start, length)
            assert hash_strings(part, hash_type).tolist() == expected(
                strings[start : start + length], hash_type
            )


def test_bytes_of_all_values(hash_type):
    array = pa.array([bytes(range(n, n + 13)) for n in range(0, 243)], pa.binary())
    assert hash_strings(array, hash_type).tolist() == expected(array.to_pylist(), hash_type)


def test_arrays_longer_than_what_is_hashed_together(hash_type):
    # More than two chunks of 16,384, and a slice that begins in the middle of a word.
    strings = [str(i * 7919) + "x" * (i % 11) for i in range(40_000)]
    array = pa.array(strings)
    assert hash_strings(array, hash_type).tolist() == expected(strings, hash_type)
    assert hash_strings(array.slice(3, 35_001), hash_type).tolist() == expected(
        strings[3:35_004], hash_type
    )


@pytest.mark.parametrize("array", [pa.array([], pa.string()), pa.array([""]), pa.array([b"", b""])])
def test_nothing_to_hash(array, hash_type):
    assert hash_strings(array, hash_type).tolist() == expected([""] * len(array), hash_type)


@pytest.mark.parametrize("hash_type", list(REFERENCES))
@given(st.lists(st.binary(max_size=300)), st.integers(0, 5), st.booleans())
@settings(max_examples=150)
def test_random_bytes(hash_type, values, start, wide):
    array = pa.array(values, pa.large_binary() if wide else pa.binary()).slice(start)
    assert hash_strings(array, hash_type).tolist() == expected(values[start:], hash_type)


NUMBERS = [0, 1, -1, 2**63 - 1, -(2**63), 2**40 + 5, -(2**40) - 5, 255, 256, 1511544070]


@pytest.mark.parametrize("hash_type", list(REFERENCES))
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
@settings(max_examples=50)
def test_integers_hash_as_their_eight_bytes(hash_type, values):
    values = NUMBERS + values
    found = hash_integers(np.array(values, np.int64), hash_type)
    assert found.dtype == np.uint64
    assert found.tolist() == expected([struct.pack("<q", v) for v in values], hash_type)


def test_unsigned_integers_hash_as_their_eight_bytes(hash_type):
    values = [0, 1, 2**63, 2**64 - 1, 2**40 + 5]
    found = hash_integers(np.array(values, np.uint64), hash_type)
    assert found.tolist() == expected([struct.pack("<Q", v) for v in values], hash_type)


@pytest.mark.parametrize("buckets", [1, 2, 3, 1000, 2048, 2_048_000, 2_000_000_000, 2**31 - 1])
def test_buckets_are_unsigned_remainders(buckets):
    found = to_buckets(np.array(NUMBERS, np.int64), buckets)
    assert found.dtype == np.int32
    assert found.tolist() == [(n % 2**64) % buckets for n in NUMBERS]
    unsigned = [0, 2**63 - 1, 2**63, 2**64 - 1, buckets, buckets - 1, buckets + 1]
    found = to_buckets(np.array(unsigned, np.uint64), buckets)
    assert found.tolist() == [n % buckets for n in unsigned]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.integers(1, 2**31 - 1))
@settings(max_examples=50)
def test_random_buckets(values, buckets):
    found = to_buckets(np.array(values, np.uint64), buckets)
    assert found.tolist() == [v % buckets for v in values]


def test_positive_ids_keep_the_low_63_bits():
    values = [0, 1, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1]
    found = to_positive_ids(np.array(values, np.uint64))
    assert found.dtype == np.int64
    assert found.tolist() == [v % 2**63 for v in values]


def test_nothing_in_nothing_out(hash_type):
    assert hash_integers(np.empty(0, np.int64), hash_type).tolist() == []
    assert to_buckets(np.empty(0, np.int64), 7).tolist() == []
    assert to_positive_ids(np.empty(0, np.uint64)).tolist() == []
