"""How good is RecTools' SASRec on the same log, with the same protocol and the same training time?

    python benchmarks/rectools_sasrec.py LOG --minutes 36 [--loss softmax] [--item_column item_id]

Runs in a separate environment with `rectools[torch]` and pyarrow<22 (for NumPy 1), without s2s_jax.
Leave-one-out: the last item of every row is the test item, the one before it the validation item, and
the model is fitted to the earlier ones for the given minutes. Then it looks for every user's test item
among the ten best of all items except those of the history, as `s2s evaluate` does when two events are
held out. Width 128, two layers, two heads, histories of 200 events, otherwise RecTools' defaults; the
validation items are not used.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytorch_lightning as pl
from pyarrow import orc
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

TOP = 10
HELD_OUT = 2


def read_events(log: Path, column: str) -> pd.DataFrame:
    """One row per event: user, item and its place in the history."""
    files = sorted(log.glob("*.orc"))
    lists = pa.chunked_array(
        [chunk for f in files for chunk in orc.read_table(f, columns=[column])[column].chunks]
    )
    items = lists.combine_chunks()
    lengths = pc.list_value_length(items).to_numpy(zero_copy_only=False)
    while pa.types.is_list(items.type):
        items = items.flatten()
    assert len(items) == lengths.sum(), f"{column}: an event must have one item"
    place = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(lengths)), lengths),
            Columns.Item: items.to_numpy(zero_copy_only=False),
            Columns.Weight: 1.0,
            # Times can be equal in a log, so the place is used as the time.
            Columns.Datetime: pd.to_datetime(place, unit="s"),
            "left": np.repeat(lengths, lengths) - place,
        }
    )


def fit(events: pd.DataFrame, loss: str, minutes: float, seed: int) -> SASRecModel:
    """Fits the model to all events except the last two of each user."""

    def trainer() -> pl.Trainer:
        return pl.Trainer(
            max_time=datetime.timedelta(minutes=minutes),
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    pl.seed_everything(seed)
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=128,
        session_max_len=200,
        loss=loss,
        get_trainer_func=trainer,
    )
    model.fit(Dataset.construct(events[events["left"] > HELD_OUT].drop(columns="left")))
    return model


def rank_of_test(model: SASRecModel, events: pd.DataFrame) -> np.ndarray:
    """Rank (1 … 10) of each user's last item among the recommended items; 0 if it is not among them."""
    history, test = events[events["left"] > 1], events[events["left"] == 1]
    users = test[Columns.User].to_numpy()
    recommended = model.recommend(
        users=users,
        dataset=Dataset.construct(history.drop(columns="left")),
        k=TOP,
        filter_viewed=True,
        on_unsupported_targets="ignore",
    )
    both = recommended.merge(test[[Columns.User, Columns.Item]], on=[Columns.User, Columns.Item])
    rank = pd.Series(0, index=users)
    rank[both[Columns.User].to_numpy()] = both[Columns.Rank].to_numpy()
    return rank.to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--item_column", default="item_id")
    parser.add_argument("--loss", default="softmax", help="softmax, BCE, gBCE or sampled_softmax")
    parser.add_argument("--minutes", type=float, default=36)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    events = read_events(args.log, args.item_column)
    begin = time.perf_counter()
    model = fit(events, args.loss, args.minutes, args.seed)
    epochs, took = model.fit_trainer.current_epoch, (time.perf_counter() - begin) / 60
    rank = rank_of_test(model, events)
    hit = rank > 0
    ndcg = np.where(hit, 1 / np.log2(np.maximum(rank, 1) + 1), 0)
    print(
        f"{args.loss}: {epochs} epochs in {took:.1f} minutes, {len(rank):,} users: "
        f"hr@10 {hit.mean():.4f}, ndcg@10 {ndcg.mean():.4f}"
    )


if __name__ == "__main__":
    main()
