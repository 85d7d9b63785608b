"""Broken exports are refused by name, and `current.json` says which version is used."""

import json
import shutil

import pytest

import s2s_serve
from s2s_serve import manifest
from s2s_serve.versions import open_version


@pytest.fixture
def copied(small_export, tmp_path):
    shutil.copytree(small_export.directory, tmp_path / "export")
    return tmp_path / "export"


def change_manifest(directory, number=1, **changes):
    """Changes values as another program would, with the right checksum."""
    path = directory / f"versions/{number}/manifest.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values | {"checksum": manifest.checksum_of(values)}))


def files_of(directory):
    return json.loads((directory / "versions/1/manifest.json").read_text())["files"]


def test_every_file_is_in_the_manifest(small_export):
    version = small_export.directory / "versions/1"
    there = {p.relative_to(version).as_posix() for p in version.rglob("*") if p.is_file()}
    assert there == {"manifest.json", *files_of(small_export.directory)}
    assert "tower.onnx" in there
    assert "tower.stablehlo" in there


def test_a_flipped_bit_in_any_file_is_found(copied):
    for name in files_of(copied):
        path = copied / "versions/1" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(s2s_serve.UserError, match=rf"{name}: its contents are not those"):
            s2s_serve.load(copied)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert s2s_serve.load(copied).version == 1


def test_missing_and_short_files_are_found_without_reading_all(copied):
    for name in files_of(copied):
        path = copied / "versions/1" / name
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(s2s_serve.UserError, match=rf"{name}: the manifest names this file"):
            s2s_serve.load(copied, check="sizes")
        path.write_bytes(data[:-1])
        with pytest.raises(s2s_serve.UserError, match=rf"{name}: expected .* bytes"):
            s2s_serve.load(copied, check="sizes")
        path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/hostname", "a/../../../secret", "..\\secret"]
)
def test_files_outside_are_refused(copied, name):
    change_manifest(copied, files=files_of(copied) | {name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(s2s_serve.UserError, match="leaves its directory"):
        s2s_serve.load(copied)


def test_a_link_that_leaves_the_directory_is_refused(copied, tmp_path):
    name = "items.parquet"
    path = copied / "versions/1" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(s2s_serve.UserError, match="leaves its directory"):
        s2s_serve.load(copied)


def test_a_shard_that_is_not_listed_is_refused(copied):
    files = files_of(copied)
    name = next(name for name in files if name.startswith("tables/"))
    del files[name]
    change_manifest(copied, files=files)
    with pytest.raises(s2s_serve.UserError, match=rf"{name} is used but not among files"):
        s2s_serve.load(copied)


def test_a_newer_format_names_what_made_it(copied):
    change_manifest(copied, format=2, made_by="s2s_jax 9.9")
    with pytest.raises(s2s_serve.UserError, match=r"expected format 1 .* found 2.*s2s_jax 9\.9"):
        s2s_serve.load(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "1"}', '{"format": 1}'])
def test_a_broken_manifest_is_refused(copied, text):
    (copied / "versions/1/manifest.json").write_text(text)
    with pytest.raises(s2s_serve.UserError, match="expected the manifest of an export"):
        s2s_serve.load(copied)


@pytest.mark.parametrize("text", ["", "{}", '{"version": "1"}', '{"version": 0}', "[1]", "null"])
def test_a_broken_current_version_is_refused(copied, text):
    (copied / "current.json").write_text(text)
    with pytest.raises(s2s_serve.UserError, match=r"current\.json: expected"):
        s2s_serve.load(copied)


def test_versions_are_chosen_by_number(copied, tmp_path):
    shutil.copytree(copied / "versions/1", copied / "versions/2")
    with pytest.raises(s2s_serve.UserError, match="expected version 2, found 1"):
        s2s_serve.load(copied, version=2)
    shutil.copy(copied / "versions/1/manifest.json", copied / "versions/2/manifest.json")
    change_manifest(copied, 2, version=2)
    assert s2s_serve.load(copied, version=2).version == 2
    assert s2s_serve.load(copied).version == 1
    (copied / "current.json").write_text('{"version": 2}')
    assert open_version(copied, None, "all")[1].version == 2
    with pytest.raises(s2s_serve.UserError, match="versions/7"):
        s2s_serve.load(copied, version=7)
    with pytest.raises(s2s_serve.UserError, match="s2s export --output"):
        s2s_serve.load(tmp_path / "nowhere")


def test_any_flipped_bit_of_the_manifest_is_found(copied):
    path = copied / "versions/1/manifest.json"
    data = path.read_bytes()
    values = json.loads(data)
    found = 0
    for place in range(0, len(data), 37):
        changed = bytearray(data)
        changed[place] ^= 1
        try:
            same = json.loads(changed) == values
        except ValueError:
            same = False
        path.write_bytes(changed)
        if not same:
            found += 1
            with pytest.raises(s2s_serve.UserError, match=r"manifest\.json|format 1 or earlier"):
                manifest.load(path.parent)
    assert found > 100


@pytest.mark.parametrize(
    "change",
    [
        {"item_feature": "nothing"},
        {"target_features": ["nothing"]},
        {"shown_len": 0},
        {"shown_len": 10**6},
        {"similarity": "x"},
        {"untrained": "x"},
        {"kinds": None},
        {"tables": {}},
        {"items": 0},
    ],
)
def test_values_that_no_export_has_are_named(copied, change):
    change_manifest(copied, **change)
    (name,) = change
    with pytest.raises(s2s_serve.UserError, match=name):
        s2s_serve.load(copied)


@pytest.mark.parametrize(
    "change", [{"op": "x"}, {"hash_type": "murmqr"}, {"combiner": "max"}, {"emb_dim": 7}]
)
def test_features_that_no_export_has_are_named(copied, change):
    path = copied / "versions/1/manifest.json"
    features = json.loads(path.read_text())["features"]
    change_manifest(copied, features=[features[0] | change, *features[1:]])
    with pytest.raises(s2s_serve.UserError, match="feature item_id"):
        s2s_serve.load(copied)
