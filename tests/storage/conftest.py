"""A real S3 server, and a proxy before it through which a test's own process reads and writes."""

from pathlib import Path

import pytest
import stores

from s2s_jax.storage import lock
from s2s_serve.storage import file_systems, scratch
from s2s_serve.storage.address import StorePath, place_of


@pytest.fixture(scope="module")
def server():
    with stores.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def proxy(server, monkeypatch):
    """Faults can be turned on."""
    made = stores.Proxy(server)
    stores.use(made.endpoint, monkeypatch)
    yield made
    made.close()
    file_systems._connected.cache_clear()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    with stores.gcs_server(tmp_path_factory.mktemp("emulator")) as endpoint:
        yield endpoint


@pytest.fixture(
    params=["s3", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("gs", "hdfs"))]
)
def any_store(request, tmp_path, monkeypatch) -> StorePath:
    """An empty directory of a store, in which a lock is free at once."""
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    if request.param == "s3":
        request.getfixturevalue("proxy")
        return place_of(f"s3://{stores.BUCKET}/{tmp_path.name}")
    if request.param == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("emulator"))
        return place_of(f"gs://{stores.BUCKET}/{tmp_path.name}")
    (tmp_path / "hdfs").mkdir()
    stores.use_double_of_hdfs(tmp_path / "hdfs", monkeypatch)
    return place_of("hdfs://node:8020/user/logs")


@pytest.fixture
def of_s3(proxy, tmp_path, monkeypatch) -> StorePath:
    """An empty directory of a store that speaks S3, in which a lock is free at once."""
    monkeypatch.setattr(lock, "_SETTLED", 0.01)
    return place_of(f"s3://{stores.BUCKET}/{tmp_path.name}")


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Path:
    """The directory for temporary files, which are gone in the end."""
    made = tmp_path / "copies"
    made.mkdir()
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(made))
    return made
