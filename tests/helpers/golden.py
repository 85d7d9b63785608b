"""The RecIS example, run in PyTorch (`golden/README.md`), and how its weights map to ours."""

import dataclasses

import numpy as np
from places import REPO

from s2s_jax.config import (
    Config,
    FeatureConfig,
    LRConfig,
    ModelConfig,
    TrainConfig,
    load_file,
    validate,
)
from s2s_jax.embedding.tables import NUM_SEGMENTS, TableSpec

GOLDEN = REPO / "tests" / "golden"

FEATURES = {
    "item_id": "item",
    "cate_id": "cate",
    "behavior_id": "behaviour",
    "timestamp": "timestamp",
}


# The names of the modules in the recorded files, and in the example.
MODULES = {"in": "dense.proj", "ln_f": "dense.trans.final_layer_norm"}
MODULES_OF_LAYERS = {
    "ln1": "norm1",
    "qkv": "attn.attn",
    "proj": "attn.proj",
    "ln2": "norm2",
    "ff1": "ffn.net.0",
    "ff2": "ffn.net.2",
}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as arrays:
        return dict(arrays)


def recis_config(golden: dict[str, np.ndarray]) -> Config:
    """`configs/recis.py` with the sizes of the golden run."""
    recis = load_file(REPO / "configs" / "recis.py")
    rate = float(golden["cfg/lr"])
    config = dataclasses.replace(
        recis,
        tables=(),
        features=tuple(
            FeatureConfig(name=name, emb_dim=int(golden["cfg/emb"]), hash_bucket_size=int(rows))
            for name, rows in zip(FEATURES, golden["cfg/rows"], strict=True)
        ),
        model=ModelConfig(
            seq_len=int(golden["cfg/seq"]),
            hidden_size=int(golden["cfg/hidden"]),
            num_layers=int(golden["cfg/layers"]),
            nhead=int(golden["cfg/heads"]),
            dim_feedforward=int(golden["cfg/ffn"]),
            dropout=0.0,
        ),
        lr=LRConfig(
            dense_lr=rate,
            sparse_lr=rate,
            beta1=float(golden["cfg/b1"]),
            beta2=float(golden["cfg/b2"]),
            eps=float(golden["cfg/eps"]),
            weight_decay=float(golden["cfg/wd"]),
        ),
        train=TrainConfig(train_steps=len(golden["losses"])),
    )
    validate(config)
    return config


def batch(golden: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """Step `step`'s ids as one microbatch of full sequences."""
    shape = golden["ids/item"].shape[1:]
    ids = [golden[f"ids/{theirs}"][step].astype(np.int32) for theirs in FEATURES.values()]
    return {"length": np.full(shape[0], shape[1], np.int32), "ids": np.stack(ids, axis=-1)}


def table_from(spec: TableSpec, by_bucket: np.ndarray) -> np.ndarray:
    """A table in our layout, from one whose row i is bucket i."""
    table = np.zeros((spec.rows, spec.emb_dim), np.float32)
    for bucket, row in enumerate(by_bucket):
        table[bucket % NUM_SEGMENTS * spec.segment_rows + bucket // NUM_SEGMENTS] = row
    return table


def params_from(golden: dict[str, np.ndarray], prefix: str, specs: dict[str, TableSpec]) -> dict:
    """The weights `prefix/*` as a tree of our parameters."""

    def weight(name: str) -> np.ndarray:
        return golden[f"{prefix}/{name}"]

    def linear(name: str) -> dict:
        return {"kernel": weight(f"{name}.weight").T, "bias": weight(f"{name}.bias")}

    def norm(name: str) -> dict:
        return {"scale": weight(f"{name}.weight"), "bias": weight(f"{name}.bias")}

    def stack(parts: list) -> dict:
        if isinstance(parts[0], dict):
            return {key: stack([part[key] for part in parts]) for key in parts[0]}
        return np.stack(parts)

    layers = [
        {
            "norm1": norm(f"layers.{i}.ln1"),
            "attn": {"qkv": linear(f"layers.{i}.qkv"), "proj": linear(f"layers.{i}.proj")},
            "norm2": norm(f"layers.{i}.ln2"),
            "ffn": {"up": linear(f"layers.{i}.ff1"), "down": linear(f"layers.{i}.ff2")},
        }
        for i in range(int(golden["cfg/layers"]))
    ]
    dense = {
        "proj": linear("in"),
        "transformer": {"layers": stack(layers), "final_norm": norm("ln_f")},
    }
    tables = {
        name: table_from(specs[name], weight(f"emb.{theirs}")) for name, theirs in FEATURES.items()
    }
    return {"dense": dense, "tables": tables}


def example_tensors(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The weights `prefix/*` with the names that they have in the example's `state_dict`."""
    tables = {f"emb.{theirs}": f"sparse.{ours}.weight" for ours, theirs in FEATURES.items()}
    found = {}
    for key, values in golden.items():
        kind, _, name = key.partition("/")
        if kind != prefix:
            continue
        if name in tables:
            found[tables[name]] = values
            continue
        module, _, parameter = name.rpartition(".")
        if module in MODULES:
            module = MODULES[module]
        else:
            _, layer, inner = module.split(".")
            module = f"dense.trans.layers.{layer}.{MODULES_OF_LAYERS[inner]}"
        found[f"{module}.{parameter}"] = values
    return found
