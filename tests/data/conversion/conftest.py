"""Runs conversions with each engine: the same inputs have to give the same logs and sentences."""

import dataclasses
import shutil
import sys

import pytest

from s2s_jax.cli.commands import convert as command
from s2s_jax.data.conversion.convert import convert
from s2s_jax.data.conversion.settings import Settings


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    """A local Spark, which all conversions of this process use."""
    sql = pytest.importorskip("pyspark.sql", reason="PySpark is not installed")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        folder = tmp_path_factory.mktemp("spark")
        started = (
            sql.SparkSession.builder.master("local[1]")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.sql.warehouse.dir", str(folder / "warehouse"))
            .config("spark.local.dir", str(folder))
            .getOrCreate()
        )
        started.sparkContext.setLogLevel("OFF")
        yield started
        started.stop()


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.slow)])
def engine(request, monkeypatch):
    """The engine that conversions take unless a test names another."""
    if request.param == "spark":
        request.getfixturevalue("spark")
        monkeypatch.setitem(Settings.__init__.__kwdefaults__, "engine", "spark")
        monkeypatch.setattr(
            command, "convert", lambda s: convert(dataclasses.replace(s, engine="spark"))
        )
    return request.param
