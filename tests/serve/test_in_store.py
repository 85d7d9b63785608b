"""Exports in a store are loaded from a checked copy, which is removed with the model."""

import json
import os
import tempfile
import time

import pytest
import server_process
import stores
from fake_model import served

import s2s_serve
from s2s_jax.errors import MachineError
from s2s_jax.exporting import version_dir
from s2s_serve import manifest
from s2s_serve.storage import file_systems
from s2s_serve.storage.address import place_of

TOP = place_of(f"s3://{stores.BUCKET}/export")
VERSION = TOP / "versions/1"
HISTORY = {"item_id": ["item 1", "item 2"], "tags": [[1], []], "timestamp": [946_700_000] * 2}


@pytest.fixture(scope="module")
def server(small_export):
    with stores.s3_server() as endpoint:
        stores.upload(endpoint, small_export.directory, "export")
        yield endpoint


@pytest.fixture
def proxy(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = stores.Proxy(server)
    stores.use(made.endpoint, monkeypatch)
    yield made
    made.close()
    file_systems._connected.cache_clear()


def test_it_answers_as_from_a_disk(proxy, small_export, tmp_path):
    proxy.failing, proxy.kinds = 0.1, ("503", "cut", "half")
    model = s2s_serve.load(str(TOP))
    assert model.recommend([HISTORY], 5) == s2s_serve.load(small_export.directory).recommend(
        [HISTORY], 5
    )
    assert len(os.listdir(tmp_path)) == 2
    del model
    assert os.listdir(tmp_path) == []


def test_what_is_not_there_or_not_that_of_the_manifest_is_refused(proxy, tmp_path):
    with pytest.raises(s2s_serve.UserError, match=rf"{TOP}/versions/7: .*there is none"):
        s2s_serve.load(TOP, version=7)
    name, text = "items.parquet", (VERSION / manifest.NAME).read_text()
    data = (VERSION / name).read_bytes()
    (VERSION / name).write_bytes(data[:-1] + b"?")
    with pytest.raises(s2s_serve.UserError, match="its contents are not those"):
        s2s_serve.load(TOP)
    (VERSION / name).write_bytes(data)
    values = json.loads(text)
    values["files"]["../../../outside"] = {"bytes": 1, "sha256": ""}
    values["checksum"] = manifest.checksum_of(values)
    (VERSION / manifest.NAME).write_text(json.dumps(values))
    with pytest.raises(s2s_serve.UserError, match="leaves its directory"):
        s2s_serve.load(TOP)
    (VERSION / manifest.NAME).write_text(text)
    assert s2s_serve.load(TOP).version == 1
    assert os.listdir(tmp_path) == []
    proxy.failing = 1.0
    file_systems._connected.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(file_systems, "_ATTEMPTS", 1)
        with pytest.raises(MachineError, match=rf"{TOP}/current.json: the store does not give it"):
            s2s_serve.load(TOP)


def test_an_interrupted_version_does_not_count_and_is_removed(proxy, monkeypatch):
    """Its manifest is the last file."""
    monkeypatch.setattr("s2s_jax.storage.lock._SETTLED", 0)
    output = place_of(f"s3://{stores.BUCKET}/interrupted")
    (output / "versions/4/items.parquet").write_bytes(b"half")
    (output / "versions/2" / manifest.NAME).write_text("{}")
    with version_dir.new_version(output) as (number, path, _):
        assert number == 3
        assert file_systems.files_below(output / "versions/4") in ([], None)
        assert path.is_dir()
    assert not path.exists()
    assert not (output / "versions/3").exists()


def test_a_server_loads_a_version_that_was_made_again_with_the_same_number(proxy):
    top = place_of(f"s3://{stores.BUCKET}/again")
    loads = []

    def make(text):
        (top / "versions/1" / manifest.NAME).write_text(text)
        (top / "current.json").write_text('{"version": 1}')

    def counted(directory):
        loads.append((directory / "versions/1" / manifest.NAME).read_text())
        return served()

    make("one")
    with server_process.app(top, load=counted, poll=0.05):
        # moto's times are whole seconds, as those of S3.
        time.sleep(1)
        make("two")
        server_process.until(lambda: loads == ["one", "two"])
