"""A real S3 server, and a proxy before it through which a test's own process reads and writes."""

import pytest
import stores

from s2s_serve.storage import file_systems


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
