"""The loss with sampled negatives, in NumPy."""

import dataclasses

import jax
import numpy as np
import of_config
import small
from jobs_of import job

from s2s_jax.config.settings import Items
from s2s_jax.ranking.encode import item_vectors
from s2s_jax.training.step.batches import put_batch

ROWS = 16


def configured(log, tmp_path, grows=False, **loss):
    config = job(log, tmp_path)
    config = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, **loss),
        model=dataclasses.replace(config.model, dropout=0.0),
    )
    return small.growing(config) if grows else config


def stream_shares(batches):
    """Shares of the first id at real positions; in batches with words, of the low word."""
    events = np.concatenate(
        [batch["ids"][np.arange(small.SEQ_LEN) < batch["length"][:, None], 0] for batch in batches]
    )
    known, count = np.unique(events, return_counts=True)
    return dict(zip(known.tolist(), count / len(events), strict=True))


def expected_loss(config, functions, state, batch, mesh, items, batches=()):
    """Mean loss in float64, from the vectors of `predict` and `item_vectors`.

    For shares from the stream, `batches` are all batches so far.
    """
    arrays = jax.tree.map(lambda x: x[0], put_batch(batch, 1, mesh))
    encoded = functions.predict(state, arrays)
    catalogue = of_config.collect(config)
    known = catalogue.item.to_pylist()
    vectors = np.empty((0, 0))
    if len(items) > 0:
        vectors = item_vectors(functions, state, catalogue, Items.of(config), mesh).astype(
            np.float64
        )
    length, seq_len = batch["length"], config.model.seq_len
    item = batch["ids"][..., 0]

    def unit(x):
        x = np.asarray(x, np.float64).reshape(len(length), seq_len, -1)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    preds, targets = unit(encoded.preds_ME), unit(encoded.targets_ME)
    p_of = dict(zip(known, catalogue.count_I / catalogue.count_I.sum(), strict=True))
    if config.loss.log_q == "stream":
        p_of = stream_shares(batches)
    losses, weights = [], []
    if config.loss.hard_negatives is not None:
        items = _hardest(config.loss, preds, item, length, items, known, vectors)
    queries = [(b, p) for b in range(len(length)) for p in range(length[b])]
    for d, b, p in ((d, b, p) for d in range(1, config.loss.next_events + 1) for b, p in queries):
        pairs = [(c, r) for c, r in queries if r + d < length[c]]
        if (b, p) not in pairs:
            continue
        target = int(item[b, p + d])
        logits = [preds[b, p] @ targets[b, p + d]]
        q = [target]
        if config.loss.negatives in ("in_batch", "mixed"):
            for c, r in pairs:
                if item[c, r + d] != target:
                    logits.append(preds[b, p] @ targets[c, r + d])
                    q.append(int(item[c, r + d]))
        for i in items:
            if known[i] != target:
                logits.append(preds[b, p] @ vectors[i])
                q.append(known[i])
        logits = np.array(logits) / config.loss.temperature
        if config.loss.log_q != "none":
            often = np.array([len(pairs) * max(p_of.get(i, 0), 2**-30) for i in q])
            logits -= np.log(often + len(items) / len(known))
        losses.append(_of_pair(config.loss, logits, len(items) / (len(known) - 1)))
        weights.append(config.loss.later_weight ** (d - 1))
    return np.average(losses, weights=weights)


def _hardest(config, preds, item, length, items, known, vectors):
    """The items that are most similar to a prediction whose next event is about another item."""
    top = dict.fromkeys(items, -np.inf)
    queries = [(b, p) for b in range(len(length)) for p in range(length[b] - 1)]
    for i in items:
        for b, p in queries:
            if item[b, p + 1] != known[i]:
                top[i] = max(top[i], preds[b, p] @ vectors[i])
    return sorted(items, key=lambda i: -top[i])[: config.hard_negatives]


def _of_pair(config, logits, rate):
    """The loss of a target, whose logit is the first, if this share of the other items is drawn."""
    if config.objective == "softmax":
        return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]
    rate = min(rate, 1)
    power = rate * (config.calibration * (1 - 1 / rate) + 1 / rate)
    losses = [power * np.log1p(np.exp(-logits[0])), *np.log1p(np.exp(logits[1:]))]
    return np.mean(losses)
