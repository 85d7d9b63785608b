"""Starts Spark for a conversion, and turns its errors into one-sentence messages.

The extra `spark` installs PySpark; Java has to be there.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from s2s_jax.data.conversion.reading.database import shorten
from s2s_jax.data.logs.orc_writer import deferring_signals
from s2s_jax.errors import UserError

# Set by spark-submit, which then decides about memory and Python.
_SUBMITTED = "PYSPARK_GATEWAY_PORT"
# Java needs this much in any case.
_LEAST_MEGABYTES = 512
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
# Rows that a task gets at a time.
_BATCH_ROWS = 65_536


@contextlib.contextmanager
def open_spark(directory: Path, memory_limit: str | None, hive: bool) -> Iterator[SparkSession]:
    """Spark, with settings of its own; a Spark that is started here ends with the `with` block.

    Args:
      directory: the directory for temporary files of a local Spark.
      memory_limit: the memory of a local Spark, such as "4GB"; None: as configured.
      hive: whether tables of a Hive metastore are needed.

    Raises:
      UserError: Spark cannot be started, or memory_limit would have no effect.
    """
    # PySpark would print each error as JSON, too.
    logging.getLogger("DataFrameQueryContextLogger").setLevel(logging.CRITICAL)
    running = SparkSession.getActiveSession()
    if running is None:
        with _started(directory, memory_limit, hive) as started:
            yield _own(started)
        return
    if memory_limit is not None:
        raise UserError(_NO_EFFECT)
    yield _own(running)


_NO_EFFECT = (
    "--memory_limit: has no effect on a Spark that is running; leave it out, and give spark-submit "
    "--driver-memory and --executor-memory instead"
)


@contextlib.contextmanager
def _started(directory: Path, memory_limit: str | None, hive: bool) -> Iterator[SparkSession]:
    builder = SparkSession.builder.appName("s2s convert")
    if _SUBMITTED in os.environ:
        if memory_limit is not None:
            raise UserError(_NO_EFFECT)
    else:
        # Otherwise Spark takes the first `python3`, which may be another Python.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.config("spark.ui.enabled", "false")
        builder = builder.config("spark.ui.showConsoleProgress", "false")
        builder = builder.config("spark.local.dir", str(directory))
        if memory_limit is not None:
            builder = builder.config("spark.driver.memory", f"{_megabytes(memory_limit)}m")
    if hive:
        builder = builder.enableHiveSupport()
    # Java stays if a signal interrupts its start.
    started: list[SparkSession] = []
    try:
        with _as_start_error(), _quiet():
            deferring_signals(lambda: started.append(builder.getOrCreate()))
        started[0].sparkContext.setLogLevel("ERROR")
        yield started[0]
    finally:
        for spark in started:
            _end(spark)


def _end(spark: SparkSession) -> None:
    """Ends Spark, also if a signal interrupted an answer of Java.

    Then the next answer is the rest of that one, which may raise any error.
    """
    try:
        spark.stop()
    except Exception:
        java = getattr(spark.sparkContext._gateway, "proc", None)
        if java is not None:
            java.kill()
            java.wait()


def unpersist(frame: DataFrame) -> None:
    """Frees what executors keep of a table, if Spark still answers."""
    with contextlib.suppress(Exception):
        frame.unpersist()


@contextlib.contextmanager
def _as_start_error() -> Iterator[None]:
    try:
        yield
    except (PySparkException, OSError) as error:
        raise UserError(
            f"--engine spark: Spark cannot be started ({shorten(str(error))}); it needs Java 17 or "
            f"later: install it, or name its directory with JAVA_HOME"
        ) from error


def _own(spark: SparkSession) -> SparkSession:
    """The same Spark with settings that do not change those of other programs."""
    own = spark.newSession()
    settings = {
        # Names of columns are exact, as in files.
        "spark.sql.caseSensitive": "true",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(_BATCH_ROWS),
    }
    for key, value in settings.items():
        own.conf.set(key, value)
    # As in the database, where times without a zone are in UTC.
    own.sql("SET TIME ZONE 'UTC'")
    return own


def _megabytes(memory_limit: str) -> int:
    """A size that DuckDB accepts, in MiB.

    Raises:
      UserError: it is too small for Spark.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)(?:B|bytes?)?\s*", memory_limit, re.I)
    if found is None:
        raise UserError(f"--memory_limit: expected a size such as 4GB, found {memory_limit}")
    base = 1024 if found[3] else 1000
    size = int(float(found[1]) * base ** _UNITS[found[2].upper()] / 2**20)
    if size < _LEAST_MEGABYTES:
        raise UserError(
            f"--memory_limit: expected at least {_LEAST_MEGABYTES}MB with --engine spark, found "
            f"{memory_limit}"
        )
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings about versions of pandas, which is not used, are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Raises errors of Spark in the `with` block as a `UserError` about `what`."""
    try:
        with _quiet():
            yield
    except (PySparkException, Py4JError) as error:
        remedy = ""
        if "No space left" in str(error):
            remedy = "; give a directory on a larger disk with --temp_dir"
        raise UserError(f"{what}: Spark failed: {_reason(error)}{remedy}") from error


def _reason(error: Exception) -> str:
    """The sentence of an error of Spark, without Java's and Python's traces."""
    lines = [line.strip() for line in str(error).splitlines()]
    # The last error in a task is the one that says what happened.
    causes = [line for line in lines if re.match(r"(Caused by: )?[\w.]+(Error|Exception): ", line)]
    return shorten(causes[-1] if causes else next(filter(None, lines), type(error).__name__))
