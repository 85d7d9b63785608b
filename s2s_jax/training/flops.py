"""The floating-point operations of a training step, and the peak of devices, to compute MFU.

MFU (model FLOPs utilisation; Chowdhery et al., "PaLM", 2022) is the number of operations of the model,
without recomputation, as a fraction of those that the devices could have done at their peak.
"""

from typing import NamedTuple

import jax

from s2s_jax.config import ModelConfig
from s2s_jax.config.settings import Sequences
from s2s_jax.model.linear import compute_dtype
from s2s_jax.training.step.settings import StepSettings

# From data sheets: dense operations per second of tensor cores, in bfloat16.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


class AtPeak(NamedTuple):
    """The time that devices would take at their peak for the operations of the model.

    Attributes:
      step: seconds per optimizer step, without packed attention.
      attended: seconds of packed attention per pair of positions, over the sequences of all devices.
    """

    step: float
    attended: float


def time_at_peak(
    settings: StepSettings, sequences: Sequences, devices: int, items: int
) -> AtPeak | None:
    """Return the time at the peak, or None if the peak of the devices is unknown; see `step_flops`."""
    peak = peak_flops(settings.model)
    if peak is None:
        return None
    step = step_flops(settings, sequences, devices, items)
    of_pair = 0.0
    if sequences.packing is not None:
        of_pair = attention_flops(settings.model, 1 / devices)
    return AtPeak(step / peak, of_pair / peak)


def step_flops(settings: StepSettings, sequences: Sequences, devices: int, items: int = 0) -> float:
    """Return the operations of a device in an optimizer step, forward and backward.

    With M positions, N pairs, C candidates per pair (S of them items of the catalogue), D concatenated
    embedding width, T embedding width of the target features, E model width, F feed-forward width, Y
    layers, B rows and L positions of a row, this is
    `6 M (D E + Y (4 E² + 2 E F)) + 6 B Y E L (L + 1) + 6 N C E + 6 S T E`, with more matrices in a layer
    for some options, and `6 N C E` for each of `loss.next_events`. Padding is counted, look-ups are not.

    Args:
      settings: the settings of the step.
      sequences: the sequences of a device's batch.
      devices: the number of devices.
      items: the number of items of the catalogue; 0 if the loss does not need them.

    Returns:
      The number of operations. With packing, it does not include those of attention, which depend on the
      sequences of each batch; see `attention_flops`.
    """
    model, loss = settings.model, settings.loss
    rows = sequences.rows * settings.microbatches
    positions = rows * model.seq_len
    width, layers = model.hidden_size, model.num_layers
    features = settings.items.features
    embedding = sum(feature.emb_dim for feature in features)
    dense = 6 * positions * (embedding * width + layers * _weights_of_layer(model))
    attention = 0.0
    if sequences.packing is None:
        attention = attention_flops(model, rows * model.seq_len * (model.seq_len + 1) // 2)
    sharing = drawn = 0
    if loss.negatives in ("in_batch", "mixed"):
        sharing = devices if loss.negative_scope == "global" else 1
    if loss.negatives != "in_batch":
        drawn = items if loss.negatives == "full" else min(loss.num_negatives, items)
    shown = sum(f.emb_dim for f in features if f.name in settings.items.shown)
    of_loss = 6 * drawn * shown * width
    kept = drawn if loss.hard_negatives is None else min(loss.hard_negatives, drawn)
    for distance in range(1, loss.next_events + 1):
        pairs = rows * (model.seq_len - distance)
        of_loss += 6 * pairs * (pairs * sharing + kept) * width
        if loss.hard_negatives is not None:
            of_loss += 2 * pairs * drawn * width
    return dense + attention + of_loss


def _weights_of_layer(model: ModelConfig) -> int:
    """Return the number of weights in the matrices of a layer."""
    width = model.hidden_size
    if model.layer != "transformer":
        return (6 if model.gated_residuals else 5) * width**2
    of_feed_forward = (3 if model.feed_forward == "swiglu" else 2) * width * model.dim_feedforward
    of_gates = 2 * width**2 if model.gated_residuals else 0
    return 4 * width**2 + of_feed_forward + of_gates


def attention_flops(model: ModelConfig, attended: float) -> float:
    """Return the operations of attention in an optimizer step, forward and backward.

    Args:
      model: the settings of the model.
      attended: the number of pairs of a position and a position that it sees, including itself:
        `n (n + 1) / 2` for a sequence of n events.
    """
    return 12 * model.num_layers * model.hidden_size * attended


def peak_flops(model: ModelConfig) -> float | None:
    """Return the peak operations per second of a device of this process, or None if unknown."""
    kind = jax.local_devices()[0].device_kind
    if compute_dtype(model).name != "bfloat16":
        return None
    known = [peak for name, peak in _PEAK_BF16.items() if name in kind]
    return known[0] if known else None
