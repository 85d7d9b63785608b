"""Gradients of the mean loss of a batch, with one or several microbatches.

Several microbatches are encoded one after the other, without keeping activations. Then the loss is
computed for all of them at once. To backpropagate its gradients, each microbatch is encoded again
(gradient caching: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup",
2021). So the result is the same as for one large batch, including its negatives.

Shapes: A microbatches, C negatives, E model width.
"""

import jax
import jax.numpy as jnp

from s2s_jax.embedding.lookup import Arrays
from s2s_jax.embedding.sharded import Found, with_default_rows
from s2s_jax.model.loss import LossTotal
from s2s_jax.model.seq2seq import Encoded
from s2s_jax.training.step.batches import Batch
from s2s_jax.training.step.forward import Forward
from s2s_jax.training.step.params import Params, Tree, default_rows


def gradients(
    forward: Forward, params: Params, found: Found, batch: Batch, key: jax.Array | None
) -> tuple[LossTotal, Params]:
    """Return the loss sums of all microbatches together, and the gradients of the mean loss.

    Args:
      forward: the model and the loss, to be differentiated.
      params: all parameters.
      found: the table rows that the batch needs.
      batch: `[A, B, …]`, see `batches.unpack`.
      key: the random key of dropout; None turns dropout off.

    Returns:
      The sums, and the gradients of the dense part, of the rows in `found` and of the default rows.
    """
    # Default rows are appended to the other rows once for all microbatches. So their gradients are
    # computed once, at the end.
    rows, pull_rows = jax.vjp(
        lambda rows, defaults: with_default_rows(rows, found.unknown, defaults),
        found.rows,
        default_rows(params),
    )
    found = found._replace(rows=rows)
    single = batch["length"].shape[0] == 1
    of_found = _of_one_microbatch if single else _of_microbatches
    sums, d_dense, d_rows = of_found(forward, params["dense"], found, batch, key)
    d_rows, d_defaults = pull_rows(d_rows)
    result: Params = {"dense": d_dense, "tables": d_rows}
    if d_defaults:
        result["unknown"] = d_defaults
    return sums, result


def _of_one_microbatch(
    forward: Forward, dense: Tree, found: Found, batch: Batch, key: jax.Array | None
) -> tuple[LossTotal, Tree, Arrays]:
    """Return the sums, and the gradients of `dense` and of the rows in `found`."""

    def objective(dense: Tree, rows: Arrays) -> tuple[jax.Array, LossTotal]:
        encoded = forward.encode(dense, rows, *_microbatch(found.places, batch, key, 0))
        negatives_CE = forward.negatives(dense, rows, found.places, batch)
        encoded = jax.tree.map(lambda x: x[None], encoded)
        return _mean_loss(forward, encoded, negatives_CE, batch)

    grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (_, sums), (d_dense, d_rows) = grad(dense, found.rows)
    return sums, d_dense, d_rows


def _of_microbatches(
    forward: Forward, dense: Tree, found: Found, batch: Batch, key: jax.Array | None
) -> tuple[LossTotal, Tree, Arrays]:
    """Return the same as `_of_one_microbatch`, with the memory of a single microbatch."""
    rows, places = found.rows, found.places
    numbers = jnp.arange(batch["length"].shape[0])

    def encode(dense: Tree, rows: Arrays, number: jax.Array) -> Encoded:
        return forward.encode(dense, rows, *_microbatch(places, batch, key, number))

    encoded = jax.lax.map(lambda number: encode(dense, rows, number), numbers)
    negatives_CE, pull_negatives = jax.vjp(
        lambda d, r: forward.negatives(d, r, places, batch), dense, rows
    )
    grad = jax.value_and_grad(
        lambda encoded, negatives_CE: _mean_loss(forward, encoded, negatives_CE, batch),
        argnums=(0, 1),
        has_aux=True,
    )
    (_, sums), (d_encoded, d_negatives) = grad(encoded, negatives_CE)

    def add_gradients(
        total: tuple[Tree, Arrays], part: tuple[jax.Array, Encoded]
    ) -> tuple[tuple[Tree, Arrays], None]:
        number, d_micro = part
        _, pull = jax.vjp(lambda d, r: encode(d, r, number), dense, rows)
        return jax.tree.map(jnp.add, total, pull(d_micro)), None

    start = pull_negatives(d_negatives)
    (d_dense, d_rows), _ = jax.lax.scan(add_gradients, start, (numbers, d_encoded))
    return sums, d_dense, d_rows


def _mean_loss(
    forward: Forward, encoded: Encoded, negatives_CE: jax.Array | None, batch: Batch
) -> tuple[jax.Array, LossTotal]:
    sums = forward.loss(encoded, negatives_CE, batch)
    return sums.mean, sums


def _microbatch(
    places: Arrays, batch: Batch, key: jax.Array | None, number: int | jax.Array
) -> tuple[Arrays, Batch, jax.Array | None]:
    """Return the places, the batch and the key of one microbatch."""
    microbatches = batch["length"].shape[0]
    # Leaves out negatives, which all microbatches share.
    events = {name: x for name, x in batch.items() if x.shape[0] == microbatches}
    places, chosen = jax.tree.map(lambda x: x[number], (places, events))
    return places, chosen, None if key is None else jax.random.fold_in(key, number)
