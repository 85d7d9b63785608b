"""Checks of the loss, and of the items that it or the tables need."""

from s2s_jax.config.checks.values import require
from s2s_jax.config.schema import Config, LossConfig


def check_loss(config: Config) -> None:
    """Refuses an impossible loss."""
    names = [f.name for f in config.features]
    loss = config.loss
    listed = ", ".join(names)
    require(loss.num_negatives >= 1, "loss.num_negatives", "at least 1", loss.num_negatives)
    require(
        not loss.corrects or loss.negatives in ("in_batch", "mixed"),
        "loss.log_q",
        f"none with loss.negatives {loss.negatives}, where all candidates are equally frequent",
        loss.log_q,
    )
    _check_objective(loss)
    _check_hard_negatives(loss)
    _check_pairs(config)
    require(
        0 <= loss.label_smoothing < 1,
        "loss.label_smoothing",
        "0 to below 1",
        loss.label_smoothing,
    )
    require(loss.temperature > 0, "loss.temperature", "more than 0", loss.temperature)
    require(
        loss.item_feature in names, "loss.item_feature", f"a feature ({listed})", loss.item_feature
    )
    by_neighbours = any(table.init == "neighbours" for table in config.tables)
    if loss.needs_catalogue or by_neighbours or config.eval.every_steps is not None:
        i = names.index(loss.item_feature)
        for key, expected in (("op", "id"), ("bag_size", 1)):
            found = getattr(config.features[i], key)
            require(
                found == expected,
                f"features.{i}.{key}",
                f"{expected}, because {loss.item_feature} is loss.item_feature and an item of the "
                f"catalogue, which the loss, tables.init or eval.every_steps needs, has one id",
                found,
            )
    if loss.target_features is not None:
        require(len(loss.target_features) > 0, "loss.target_features", "one or more", ())
        for name in loss.target_features:
            require(name in names, "loss.target_features", f"features ({listed})", name)
    shown = {config.feature(name).column_name for name in config.target_features}
    for i, feature in enumerate(config.features):
        require(
            not feature.of_next or feature.column_name not in shown,
            f"features.{i}.of_next",
            f"False for columns of target features ({', '.join(sorted(shown))}), which would give the "
            "target away",
            feature.of_next,
        )


def _check_pairs(config: Config) -> None:
    loss = config.loss
    require(
        1 <= loss.next_events < config.model.seq_len,
        "loss.next_events",
        f"1 to {config.model.seq_len - 1}, because model.seq_len is {config.model.seq_len}",
        loss.next_events,
    )
    require(
        loss.next_events == 1 or loss.pairing == "next",
        "loss.next_events",
        "1 with loss.pairing previous",
        loss.next_events,
    )
    require(
        0 < loss.later_weight <= 1, "loss.later_weight", "more than 0, up to 1", loss.later_weight
    )


def _check_objective(loss: LossConfig) -> None:
    require(0 <= loss.calibration <= 1, "loss.calibration", "0 to 1", loss.calibration)
    if loss.objective == "softmax":
        return
    require(
        loss.negatives in ("uniform", "full"),
        "loss.objective",
        f"softmax with loss.negatives {loss.negatives}, because gbce needs negatives that are all "
        f"equally frequent (uniform or full)",
        loss.objective,
    )
    require(
        loss.label_smoothing == 0,
        "loss.label_smoothing",
        "0 with loss.objective gbce, which has no softmax to smooth",
        loss.label_smoothing,
    )


def _check_hard_negatives(loss: LossConfig) -> None:
    number = loss.hard_negatives
    if number is None:
        return
    path = "loss.hard_negatives"
    require(number >= 1, path, "None or at least 1", number)
    for is_possible, reason in (
        (loss.negatives != "in_batch", "with loss.negatives in_batch, which samples no items"),
        (loss.objective == "softmax", "with loss.objective gbce, which needs uniform negatives"),
        (not loss.corrects, "with loss.log_q, which assumes that items are drawn at random"),
    ):
        require(is_possible, path, f"None {reason}", number)


def check_initial_items(config: Config) -> None:
    """Refuses initial rows of tables that cannot be made."""
    item = config.feature(config.loss.item_feature)
    for table in config.tables:
        if table.init == "normal":
            continue
        path = f"tables.{table.name}"
        require(
            table.name == item.table_name,
            f"{path}.init",
            f"normal, because only the table of loss.item_feature ({item.table_name}) has items whose "
            f"neighbours can be counted",
            table.init,
        )
        require(
            table.admit_after == 1,
            f"{path}.admit_after",
            "1, because init is neighbours, which gives items their rows before training starts",
            table.admit_after,
        )
        require(
            table.evict_below == 0,
            f"{path}.evict_below",
            "0, because init is neighbours: rare items would lose the rows that they begin with",
            table.evict_below,
        )
