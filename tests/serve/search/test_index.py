"""The index against rankings of all items in float64."""

import sys
import threading

import numpy as np
import pytest

from s2s_serve.errors import UserError
from s2s_serve.search.index import Index, build
from s2s_serve.search.recall import recall, tune, users_like_items

ITEMS, WIDTH = 4000, 24


def vectors(kind: str, items: int = ITEMS) -> np.ndarray:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(80, WIDTH))
    found = centers[rng.integers(80, size=items)] + 0.5 * rng.normal(size=(items, WIDTH))
    if kind == "lengths":
        found *= np.exp(rng.normal(size=(items, 1)))
    if kind == "huge":
        found *= 1e7
    if kind == "tiny":
        found *= 1e-9
    if kind == "unit":
        found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float32)


def users(count: int = 60) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, WIDTH)).astype(np.float32)


def best(vectors_IE, users_UE, k):
    scores_UI = users_UE.astype(np.float64) @ vectors_IE.astype(np.float64).T
    return np.argsort(-scores_UI, axis=1)[:, :k], scores_UI


def built(tmp_path, vectors_IE, **settings) -> Index:
    build(vectors_IE, tmp_path / "items.index", **settings)
    return Index.open(tmp_path / "items.index", *vectors_IE.shape)


@pytest.mark.parametrize("kind", ["unit", "lengths", "huge", "tiny"])
def test_with_all_groups_the_best_items_are_found(tmp_path, kind):
    vectors_IE, users_UE = vectors(kind), users()
    index = built(tmp_path, vectors_IE)
    found_UK = index.search(users_UE, 10, effort=index.groups)
    expected_UK, scores_UI = best(vectors_IE, users_UE, 10)
    assert found_UK.dtype == np.int64
    assert (
        np.mean([np.isin(a, b).mean() for a, b in zip(found_UK, expected_UK, strict=True)]) > 0.99
    )
    # Best first, up to the rounding to half precision.
    score_UK = np.take_along_axis(scores_UI, found_UK, axis=1)
    assert (np.diff(score_UK, axis=1) < 2e-3 * np.abs(score_UK).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("kind", ["unit", "lengths"])
def test_few_groups_find_most_of_the_best_items(tmp_path, kind):
    vectors_IE = vectors(kind)
    users_UE = users_like_items(vectors_IE, 100)
    index = built(tmp_path, vectors_IE)
    quarter = index.groups // 4
    expected_UK, _ = best(vectors_IE, users_UE, 10)
    found_UK = index.search(users_UE, 10, effort=quarter)
    shared = [np.isin(a, b).mean() for a, b in zip(found_UK, expected_UK, strict=True)]
    # A quarter of the groups, drawn at random, would find a quarter.
    assert np.mean(shared) > 0.9
    assert recall(index, vectors_IE, users_UE, 10, quarter) == pytest.approx(
        np.mean(shared), abs=1e-3
    )


def test_more_groups_are_compared_until_there_are_enough_items(tmp_path):
    vectors_IE = vectors("unit")
    index = built(tmp_path, vectors_IE)
    found_UK = index.search(users(3), ITEMS, effort=1)
    assert (np.sort(found_UK, axis=1) == np.arange(ITEMS)).all()
    found_UK = index.search(users(3), ITEMS + 2, effort=1)
    assert (np.sort(found_UK[:, :ITEMS], axis=1) == np.arange(ITEMS)).all()
    assert (found_UK[:, ITEMS:] == -1).all()


def test_longer_lists_take_more_effort(tmp_path):
    vectors_IE, users_UE = vectors("unit"), users()
    build(vectors_IE, tmp_path / "index")
    index = Index.open(tmp_path / "index", *vectors_IE.shape, effort=20)
    for m, effort in ((1, 20), (100, 20), (400, 40), (900, 60)):
        found_UM = index.search(users_UE, m)
        assert (found_UM == index.search(users_UE, m, effort)).all()
        assert (found_UM != index.search(users_UE, m, effort - 3)).any()


@pytest.mark.parametrize("items", [1, 2, 7])
def test_a_few_items(tmp_path, items):
    vectors_IE = vectors("unit", items)
    index = built(tmp_path, vectors_IE)
    found_UK = index.search(users(5), 3)
    expected_UK, _ = best(vectors_IE, users(5), 3)
    assert (found_UK[:, : min(items, 3)] == expected_UK).all()
    assert (found_UK[:, items:] == -1).all()
    assert index.search(np.zeros((0, WIDTH), np.float32), 3).shape == (0, 3)


def test_items_without_directions(tmp_path):
    """Vectors of zeros, and many equal ones: each is found once."""
    vectors_IE = np.zeros((500, WIDTH), np.float32)
    vectors_IE[100:] = vectors("unit", 1)
    index = built(tmp_path, vectors_IE)
    found_UK = index.search(vectors_IE[-1:], 500)
    assert (np.sort(found_UK) == np.arange(500)).all()
    assert (np.sort(found_UK[:, :400]) == np.arange(100, 500)).all()
    # Any of the equal items is right.
    assert recall(index, vectors_IE, vectors_IE[-1:], 10, index.groups) == 1


def test_the_file_depends_on_the_seed_only(tmp_path):
    np.save(tmp_path / "vectors.npy", vectors("unit"))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    files = {}
    for name, given, threads, seed in (
        ("a", vectors("unit"), 1, 0),
        ("b", mapped, 2, 0),
        ("c", mapped, 1, 1),
    ):
        build(given, tmp_path / name, threads=threads, seed=seed)
        files[name] = (tmp_path / name).read_bytes()
    assert files["a"] == files["b"] != files["c"]


def test_reading_in_parts_changes_nothing(tmp_path, monkeypatch):
    build(vectors("lengths"), tmp_path / "whole")
    monkeypatch.setattr("s2s_serve.search.index._PART", 333 * WIDTH)
    shares: list[float] = []
    build(vectors("lengths"), tmp_path / "parts", progress=shares.append)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) > 10


def test_threads_get_the_same_answers(tmp_path):
    vectors_IE, users_UE = vectors("unit"), users()
    index = built(tmp_path, vectors_IE)
    expected = {effort: index.search(users_UE, 20, effort) for effort in (4, 40)}
    wrong = []

    def ask(effort):
        for _ in range(5):
            for user in range(len(users_UE)):
                found = index.search(users_UE[user : user + 1], 20, effort)
                if not np.array_equal(found[0], expected[effort][user]):
                    wrong.append((effort, user))

    threads = [threading.Thread(target=ask, args=(effort,)) for effort in (4, 40, 4, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_effort_is_the_lowest_that_is_enough(tmp_path):
    vectors_IE = vectors("unit")
    users_UE = users_like_items(vectors_IE, 100)
    index = built(tmp_path, vectors_IE)
    expected_UK, _ = best(vectors_IE, users_UE, 20)

    def found(effort):
        found_UK = index.search(users_UE, 20, effort)
        pairs = zip(found_UK, expected_UK, strict=True)
        recall_U = [np.isin(a, b).mean() for a, b in pairs]
        return np.mean(recall_U), np.std(recall_U) / np.sqrt(len(recall_U))

    recalls = [found(effort) for effort in range(1, index.groups // 3)]
    for wanted in (0.3, 0.5, 0.8, 0.9, 0.93, 0.95, 0.97):
        tuned = tune(index, vectors_IE, users_UE, k=20, wanted=wanted)
        assert tuned.reached
        assert tuned.effort == 1 + next(
            i for i, (mean, error) in enumerate(recalls) if mean - error >= wanted
        )
        assert tuned.recall == pytest.approx(recalls[tuned.effort - 1][0], abs=1e-6)
        assert tuned.share == tuned.effort / index.groups


def test_a_recall_that_cannot_be_reached(tmp_path):
    """Half precision cannot tell these items apart."""
    vectors_IE = 1 + 1e-5 * np.random.default_rng(0).normal(size=(1000, WIDTH)).astype(np.float32)
    index = built(tmp_path, vectors_IE)
    tuned = tune(index, vectors_IE, users(), k=20, wanted=0.98)
    assert not tuned.reached
    assert tuned.recall < 0.5
    assert tuned.effort == index.groups


def test_a_vector_that_is_not_finite(tmp_path):
    vectors_IE = vectors("unit")
    vectors_IE[1234, 5] = np.nan
    with pytest.raises(UserError, match=r"found nan or inf in item number 1234; use"):
        build(vectors_IE, tmp_path / "index")


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(
        UserError, match=r"missing/index: expected a place for an index of .* space"
    ):
        build(vectors("unit", 100), tmp_path / "missing" / "index")


def test_files_that_are_no_index_of_these_items(tmp_path):
    import faiss

    path = tmp_path / "items.index"
    with pytest.raises(UserError, match=r"items.index: expected .* found no file; export again"):
        Index.open(path, ITEMS, WIDTH)
    build(vectors("unit"), path)
    with pytest.raises(
        UserError, match=r"of 4,001 items of width 24, found 4,000 items of width 24"
    ):
        Index.open(path, ITEMS + 1, WIDTH)
    with pytest.raises(UserError, match=r"found 4,000 items of width 24; export again"):
        Index.open(path, ITEMS, WIDTH + 1)
    whole = path.read_bytes()
    for broken in (b"", b"PK\3\4" * 999, whole[:50], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"found a file that is broken, or is no index; export"):
            Index.open(path, ITEMS, WIDTH)
    other = faiss.IndexFlatIP(WIDTH)
    other.add(vectors("unit"))
    faiss.write_index(other, str(path))
    with pytest.raises(UserError, match=r"found an index of another kind; export again"):
        Index.open(path, ITEMS, WIDTH)


def test_without_faiss(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"index: expected the package faiss-cpu, .* pip install"):
        build(vectors("unit"), tmp_path / "index")
