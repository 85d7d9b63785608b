"""Floating-point operations of a training step, and what devices can do: the parts of MFU.

MFU (model FLOPs utilisation; Chowdhery et al., "PaLM", 2022) is operations that the model needs, not
those that recomputation adds, divided by those that the device could have done.
"""

import jax

from s2s_jax.config import Config
from s2s_jax.model.transformer import compute_dtype

# Data sheets: dense operations a second with tensor cores, in bfloat16.
_PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def step_flops(config: Config, devices: int) -> float:
    """Operations of one device in one optimizer step, forward and backward.

    With M positions, N pairs, C candidates of each, D concatenated embedding width, E model width, F
    feed-forward width, Y layers, B rows and L positions of one:
    `6 M (D E + Y (4 E² + 2 E F)) + 6 B Y E L (L + 1) + 6 N C E`. Lookups are left out, padding is not.
    """
    model, loss = config.model, config.loss
    rows = config.io.batch_size * config.train.gradient_accumulation_steps
    positions, pairs = rows * model.seq_len, rows * (model.seq_len - 1)
    width, layers = model.hidden_size, model.num_layers
    embedding = sum(feature.emb_dim for feature in config.features)
    of_layer = 4 * width**2 + 2 * width * model.dim_feedforward
    dense = 6 * positions * (embedding * width + layers * of_layer)
    attention = 6 * rows * layers * width * model.seq_len * (model.seq_len + 1)
    candidates = 0
    if loss.negatives in ("in_batch", "mixed"):
        candidates = pairs * (devices if loss.negative_scope == "global" else 1)
    if loss.negatives in ("mixed", "uniform"):
        candidates += loss.num_negatives
    return dense + attention + 6 * pairs * candidates * width


def peak_flops(config: Config) -> float | None:
    """Operations a second of one of this process's devices, None where they are not known."""
    kind = jax.local_devices()[0].device_kind
    if compute_dtype(config.model).name != "bfloat16":
        return None
    known = [peak for name, peak in _PEAK_BF16.items() if name in kind]
    return known[0] if known else None
