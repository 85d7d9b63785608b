"""A table of a run's metrics, for the terminal."""

from rich.console import Console
from rich.table import Table

from s2s_jax.runs.metrics_file import read_lines
from s2s_serve.storage.address import Place


def print_summary(run_dir: Place, console: Console, rows: int = 6) -> None:
    """Prints a table of some lines of metrics.jsonl, including the first and the last."""
    lines = [line for line in read_lines(run_dir) if "loss" in line]
    if not lines:
        return
    picked = sorted({round(i * (len(lines) - 1) / max(rows - 1, 1)) for i in range(rows)})
    table = Table(title=f"{run_dir}")
    for column in ("step", "loss", "hit rate", "tokens/s", "ms per step", "waiting for input"):
        table.add_column(column, justify="right")
    for line in (lines[i] for i in picked):
        table.add_row(
            f"{line['step']:,}",
            f"{line['loss']:.4f}",
            f"{line['hit_rate']:.4f}",
            f"{line['tokens_per_sec']:,.0f}",
            f"{line['step_ms']:.1f}",
            f"{line['input_wait_ms']:.1f}",
        )
    console.print(table)
