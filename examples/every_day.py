"""Trains on the newest events, measures, exports and recommends, every night: a DAG for Airflow 3.

The environment variable SHOP names a directory that all workers see. It has `events/` (files for `s2s
convert`) and `config.py` (written by `s2s init`). Each day adds `logs/DAY/`, `runs/DAY/` and
`recommendations/DAY/`, and a version of `export/`, which `s2s serve` begins to use by itself.
"""

import datetime
import json
import os
import signal
import subprocess
from pathlib import Path

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

SHOP = Path(os.environ["SHOP"])
# The columns of the events, besides user_id and timestamp.
FEATURES = ("item_id",)
# The exit code of a command that was stopped and has saved its work.
STOPPED = 75
# Seconds that a command has to save its work when it is told to stop.
SAVING = 600
# A model that is worse than this share of the figure of the model before it is not exported.
LEAST_SHARE = 0.9


@task(retries=20, retry_delay=datetime.timedelta(minutes=1))
def s2s(*words: str) -> None:
    """Runs a command of s2s; Airflow starts it again only if that can help."""
    code = code_of(["s2s", *words])
    # Killed, for example because the machine was given to someone else, or stopped.
    if code == STOPPED or code < 0:
        raise RuntimeError(
            f"s2s {words[0]} ended with {code}; it continues when it is started again"
        )
    if code:
        raise AirflowFailException(f"s2s {words[0]} ended with {code}; its last lines say why")


def code_of(words: list[str]) -> int:
    """The exit code of a command. If the task is stopped, tells the command so, and lets it save."""

    def stop(*_: object) -> None:
        # A second signal must not interrupt the saving.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("Airflow stops the task; it continues when it is started again")

    # In its own session: SIGTERM may also be sent to all processes at once, and a second one would end
    # the command before it has saved.
    command = subprocess.Popen(words, start_new_session=True)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        return command.wait()
    except BaseException:  # Also a timeout of the task, or Ctrl-C.
        command.terminate()
        try:
            command.wait(SAVING)
        except subprocess.TimeoutExpired:
            command.kill()
            command.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@task
def check(measured: str) -> None:
    """Stops before the export if the model is worse than counting, or much worse than the one before."""
    metrics = json.loads(Path(measured).read_text())["metrics"]
    found, counted = metrics["eval/ndcg@10"], metrics["eval/neighbours/ndcg@10"]
    if found < counted:
        raise AirflowFailException(
            f"NDCG@10 is {found:.4f}, and {counted:.4f} by counting neighbours"
        )
    exported = SHOP / "exported.json"
    if exported.exists():
        before = json.loads(exported.read_text())["metrics"]["eval/ndcg@10"]
        if found < LEAST_SHARE * before:
            raise AirflowFailException(f"NDCG@10 is {found:.4f}, and was {before:.4f}")


@task
def remember(measured: str) -> None:
    """Keeps the figures of the model that is exported."""
    (SHOP / "exported.json").write_text(Path(measured).read_text())


@dag(
    schedule="0 4 * * *",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,
    max_active_runs=1,
)
def every_day() -> None:
    """The tasks of a day. Airflow replaces `{{ ds }}` by the date."""
    log, run = f"{SHOP}/logs/{{{{ ds }}}}", f"{SHOP}/runs/{{{{ ds }}}}"
    measured = f"{run}/evaluation.json"
    of_run = ["--config", f"{SHOP}/config.py", "--io.data_paths", log, "--train.output_dir", run]

    def command(name: str, *words: str):
        return s2s.override(task_id=name)(name, *words)

    (
        command(
            "convert",
            *(f"{SHOP}/events", "--output", log, "--overwrite", "True"),
            *("--features", *FEATURES),
        )
        >> command("train", *of_run)
        >> command("evaluate", *of_run, "--output", measured)
        >> check(measured)
        >> command("export", *of_run, "--output", f"{SHOP}/export")
        >> remember(measured)
        >> command(
            "recommend",
            *of_run,
            *("--input", log, "--user_column", "user_id"),
            *("--output", f"{SHOP}/recommendations/{{{{ ds }}}}"),
        )
    )


every_day()
