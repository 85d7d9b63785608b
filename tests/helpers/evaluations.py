"""Small runs to evaluate, and their rows."""

import dataclasses

import jax
import numpy as np
import small
from jobs_of import job
from pyarrow import orc

from s2s_jax.config import LastEvents
from s2s_jax.training.step.batches import put_batch


def evaluating(log, run_dir, grows=False, **settings):
    config = job(log, run_dir)
    made = {"split": LastEvents(events=2), "batch_size": 32} | settings
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **made))
    return small.growing(config) if grows else config


def rows_of(log):
    """Items, behaviours and tags of each user, as stored in the files."""
    tables = [orc.read_table(str(path)) for path in sorted(log.glob("*.orc"))]
    return [row for table in tables for row in table.to_pylist()]


def user_vector(config, run, rows, mesh):
    """The vector of each user, computed one by one from the whole history with `predict`."""
    vectors = []
    for begin in range(0, len(rows), 8):
        part = rows[begin : begin + 8]
        length, ids = np.zeros(8, np.int32), []
        for feature in config.features:
            shape = (8, config.model.seq_len, feature.bag_size)
            mine = np.full(shape, -1, np.int64)
            for n, row in enumerate(part):
                newest = row[feature.name][-config.model.seq_len :]
                length[n] = len(newest)
                for position, bag in enumerate(newest):
                    mine[n, position, : len(bag)] = bag
            words = small.to_words(mine) if feature.grows else mine[..., None].astype(np.int32)
            ids.append(words.reshape(8, config.model.seq_len, -1))
        batch = put_batch({"length": length, "ids": np.concatenate(ids, axis=-1)}, 1, mesh)
        encoded = run.functions.predict(run.state, jax.tree.map(lambda x: x[0], batch))
        states = np.asarray(encoded.preds_ME).reshape(8, config.model.seq_len, -1)
        vectors += [states[n, length[n] - 1] for n in range(len(part))]
    vectors = np.array(vectors)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cut(row, end):
    return {name: column[:end] for name, column in row.items()}


def config_file(config, tmp_path):
    """A config file for commands."""
    path = tmp_path / "config.py"
    path.write_text(
        "from pathlib import Path\n"
        "from s2s_jax.config import load_json\n"
        f"def get_config():\n    return load_json(Path({config.train.output_dir!r}) / 'config.json')\n"
    )
    return str(path)
