"""Tables of a cluster, as Spark reads them."""

from typing import NamedTuple

from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType

from s2s_jax.data.conversion.description import Description
from s2s_jax.data.conversion.reading import sql
from s2s_jax.data.conversion.reading.database import Database, shorten
from s2s_jax.data.conversion.reading.scans import of_events
from s2s_jax.errors import UserError


class Table(NamedTuple):
    """A table, or a directory of files that Spark reads as one.

    Attributes:
      frame: the columns that are taken, and for each row its file and the first byte of its part of it.
      scan: how DuckDB reads these rows, as the table `source`.
      has_order: whether events with equal times have an order: that of the files, or of lists.
    """

    frame: DataFrame
    scan: sql.Scan
    has_order: bool


def open_table(
    spark: SparkSession, name: str, description: Description, database: Database
) -> Table:
    """The table of a name such as `shop.events`, or of a directory such as parquet.`/path`.

    Raises:
      UserError: there is no such table, it lacks a column, or has it in a type that cannot be used.
    """
    try:
        frame = spark.table(name)
        names = frame.columns
    except PySparkException as error:
        raise UserError(
            f"{name}: Spark cannot read this table ({shorten(str(error))}); give a name that Spark's "
            f"catalogue has, or a directory, such as parquet.`/path`"
        ) from error
    taken = [column for column in description.selection.columns if column in names]
    columns = [_column(frame, column).alias(f"c{i}") for i, column in enumerate(taken)]
    # An empty table with the types that the rows have when they arrive in a task.
    empty = frame.select(*columns).limit(0).toArrow()
    database.register("source", empty)
    types = {row[0]: row[1] for row in database.run("DESCRIBE source")} if taken else {}
    known = {column: sql.Column(f"c{i}", types[f"c{i}"]) for i, column in enumerate(taken)}
    others = {column: sql.Column("NULL", "NULL") for column in names}
    scan = of_events(description, sql.Scan(name, "source", others | known), database)
    frame, from_files = _with_parts(frame, columns)
    has_order = from_files or scan.lists is not None
    if not has_order and description.selection.time is None:
        raise UserError(
            f"{name}: expected files, whose rows have an order, for --time_column none; name a column "
            f"of times"
        )
    return Table(frame, scan, has_order)


def _column(frame: DataFrame, name: str) -> Column:
    """A column; bytes are taken for text, as in Parquet files."""
    column = frame[f"`{name.replace('`', '``')}`"]
    return column.cast("string") if isinstance(frame.schema[name].dataType, BinaryType) else column


def _with_parts(frame: DataFrame, columns: list[Column]) -> tuple[DataFrame, bool]:
    """The columns with the part of a file that each row is from, and whether rows are from files."""
    try:
        file = F.col("_metadata.file_path"), F.col("_metadata.file_block_start")
        parts = frame.select(*columns, file[0].alias("file"), file[1].alias("start"))
        assert parts.schema  # Analyses the columns now.
    except AnalysisException:
        task = F.lit("").alias("file"), F.spark_partition_id().cast("bigint").alias("start")
        return frame.select(*columns, *task), False
    return parts, True
