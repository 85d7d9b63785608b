"""The report of a run as one HTML page: headline numbers, curves, evaluations, users, configuration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from s2s_jax.config import Config, FeatureConfig, TrainConfig
from s2s_jax.config.settings import Split
from s2s_jax.reporting.charts import Chart, Series, figure, number_text
from s2s_jax.reporting.markup import data, document, escaped, table
from s2s_jax.reporting.record import Line, Record, SavedEvaluation, curve
from s2s_jax.reporting.shown_users import Event, Recommended, Shown, ShownUser
from s2s_jax.training.evaluations import NEIGHBOURS_WEIGHT

_EVALUATED = ("hr@10", "ndcg@10", "mrr")
# If the largest gradient norm is this many times the smallest, the axis is logarithmic.
_WIDE = 20
_SLICED = ("hr@10", "ndcg@10")
# Rankings without a model, and what the page calls them.
_BASELINES = {"eval/popularity/": "by popularity", "eval/neighbours/": "by neighbours"}
# What the metrics of training are compared with: also the model without counted neighbours, if their
# weight was chosen.
_COMPARED = _BASELINES | {"eval/model_alone/": "by the model alone"}


def make_page(config: Config, record: Record, shown: Shown | str, titles: Mapping[str, str]) -> str:
    """The report as HTML.

    Args:
      config: the configuration of the run, whose keys are listed.
      record: the record of the run.
      shown: users to show, or a sentence that says why there are none; "" leaves that part out.
      titles: titles of items, by the text of their ids.
    """
    name = record.run_dir.resolve().name
    growing = list(dict.fromkeys(f.table_name for f in config.features if f.grows))
    body = [
        f"<h1>{data(name)}</h1>\n",
        _headline(record, config.train),
        _curves(record),
        _tables(record.training, growing),
        _saved(record),
        _users(shown, titles, Split.of(config), config.eval.filter_seen),
        _configuration(config),
    ]
    return document(f"{name}: report of a run", "".join(body))


# ---------------------------------------------------------------------------------- headline


def _headline(record: Record, train: TrainConfig) -> str:
    if not record.training:
        no_lines = '<p class="quiet">metrics.jsonl has no line of training yet.</p>\n'
        return no_lines + _cards(_best_card(record))
    last, end = record.training[-1], train.train_steps
    cards = [
        ("steps", number_text(last["step"]), "" if end is None else f"of {end:,}"),
        ("loss", f"{last['loss']:.4f}", f"mean of the last {train.log_steps:,} steps"),
    ]
    if "hit_rate" in last:
        cards.append(("hit rate", f"{last['hit_rate']:.4f}", "in training, at the end"))
    cards += _best_card(record) + _speed_cards(record.training)
    if "skipped_rows" in last:
        cards.append(("rows skipped", number_text(last["skipped_rows"]), "listed in skipped.jsonl"))
    return _cards(cards)


def _best_card(record: Record) -> list[tuple[str, str, str]]:
    metric = record.metric
    if record.best is None:
        return []
    note = f"step {number_text(record.best['step'])}, validation"
    for prefix, told_as in _COMPARED.items():
        if f"{prefix}{metric}" in record.best:
            note += f"; {told_as} {record.best[f'{prefix}{metric}']:.4f}"
    if NEIGHBOURS_WEIGHT in record.best:
        note += f"; with neighbours of weight {record.best[NEIGHBOURS_WEIGHT]:g}"
    return [(f"best {metric}", f"{record.best[f'eval/{metric}']:.4f}", note)]


def _speed_cards(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """Cards of speeds. They show medians, since some lines include compilation."""
    cards = []
    for key, name in (("tokens_per_sec", "tokens/s"), ("examples_per_sec", "users/s")):
        values = [line[key] for line in lines if key in line]
        if values:
            cards.append((name, f"{np.median(values):,.0f}", "median"))
    waits = [line["input_wait_ms"] / line["step_ms"] for line in lines if _timed(line)]
    if waits:
        cards.append(("waiting for input", f"{np.median(waits):.1%}", "of a step, median"))
    values = [line["mfu"] for line in lines if "mfu" in line]
    if values:
        cards.append(("MFU", f"{np.median(values):.1%}", "of the devices' peak, median"))
    return cards


def _timed(line: Line) -> bool:
    return "input_wait_ms" in line and "step_ms" in line and line["step_ms"] > 0


def _cards(cards: Sequence[tuple[str, str, str]]) -> str:
    parts = [
        f'<div class="card">{escaped(name)}<b>{escaped(value)}</b>'
        f'<span class="quiet">{escaped(note)}</span></div>\n'
        for name, value, note in cards
    ]
    return f'<div class="cards">{"".join(parts)}</div>\n' if parts else ""


# ------------------------------------------------------------------------------------ curves


def _curves(record: Record) -> str:
    lines = record.training

    def of(key: str, name: str) -> Series:
        return curve(lines, key, name)

    norm = of("grad_norm", "gradient norm")
    charts = [
        Chart("loss", (of("loss", "loss"),)),
        Chart("hit rate", (of("hit_rate", "hit rate"),), from_zero=True),
        *_evaluation_charts(record),
        Chart("tokens/s", (of("tokens_per_sec", "tokens/s"),), from_zero=True),
        Chart(
            "milliseconds per step",
            (of("step_ms", "all"), of("input_wait_ms", "waiting for input")),
            from_zero=True,
        ),
        Chart("gradient norm", (norm,), from_zero=True, log=_is_wide(norm)),
        Chart("MFU", (of("mfu", "MFU"),), from_zero=True),
    ]
    figures = "".join(figure(chart) for chart in charts)
    if not record.evaluations:
        figures += _quiet("There was no evaluation during training (eval.every_steps).")
    return f'<h2>Curves</h2>\n<div class="charts">{figures}</div>\n'


def _evaluation_charts(record: Record) -> list[Chart]:
    charts = []
    for name in dict.fromkeys([*_EVALUATED, record.metric]):
        series = [curve(record.evaluations, f"eval/{name}", "model")]
        for prefix, told_as in _COMPARED.items():
            baseline = curve(record.evaluations, f"{prefix}{name}", told_as)
            # Evaluations of older versions do not have all of them.
            series += [baseline] if len(baseline.x_P) else []
        charts.append(Chart(f"validation {name}", tuple(series), from_zero=True))
    return charts


def _is_wide(series: Series) -> bool:
    y_P = series.y_P[np.isfinite(series.y_P)]
    return len(y_P) > 0 and bool(y_P.min() > 0 and y_P.max() > _WIDE * y_P.min())


def _tables(lines: list[Line], names: Sequence[str]) -> str:
    """Charts of growing tables; empty if there are none.

    Args:
      lines: lines of training, sorted by step.
      names: names of the growing tables.
    """
    figures, still = [], []
    for name in names:
        of = f"table/{name}/"
        rows, capacity, dropped, evicted = (
            curve(lines, of + key, key) for key in ("rows", "capacity", "dropped", "evicted")
        )
        figures.append(figure(Chart(f"rows of {name}", (rows, capacity), from_zero=True)))
        lost = (dropped, evicted)
        if any(series.y_P.any() for series in lost):
            title = f"ids that {name} has lost since the run began"
            figures.append(figure(Chart(title, lost, from_zero=True)))
        elif len(rows.x_P):
            still.append(f"<p>{data(name)} has not dropped or evicted any ids.</p>\n")
    if not any(figures):
        return ""
    return f'<h2>Tables that grow</h2>\n<div class="charts">{"".join(figures)}</div>\n' + "".join(
        still
    )


# ------------------------------------------------------------------------- saved evaluations


def _saved(record: Record) -> str:
    if not record.saved and not record.others:
        return ""
    parts = ["<h2>Evaluations</h2>\n", *(_evaluation(found) for found in record.saved)]
    if record.others:
        listed = ", ".join(data(name) for name in record.others)
        parts.append(f'<p class="quiet">Not shown: {listed}.</p>\n')
    return "".join(parts)


def _evaluation(found: SavedEvaluation) -> str:
    values = found.metrics
    users = f", {number_text(values['eval/users'])} users" if "eval/users" in values else ""
    heading = f"{found.split} events, step {number_text(found.step)}{users}"
    rows = []
    for name, (low, high) in found.intervals.items():
        # With one target event per user, recall equals the hit rate.
        if name in values and not name.startswith("eval/recall@"):
            baselines = [prefix + name.removeprefix("eval/") for prefix in _BASELINES]
            rows.append(
                [
                    escaped(name.removeprefix("eval/")),
                    f"{values[name]:.4f}",
                    f"{low:.4f} to {high:.4f}",
                    *(f"{values[key]:.4f}" if key in values else "-" for key in baselines),
                ]
            )
    means = table(("metric", "value", "95% interval", *_BASELINES.values()), rows)
    conditions = _quiet(f"{', '.join(found.conditions)}.") if found.conditions else ""
    return f"<h3>{escaped(heading)}</h3>\n{conditions}{means}{_slices(values)}"


def _slices(values: Mapping[str, float]) -> str:
    names = dict.fromkeys(key.split("/")[1] for key in values if key.count("/") == 2)
    rows = []
    for name in names:
        keys = [f"eval/{name}/{metric}" for metric in ("users", *_SLICED)]
        baseline = f"eval/{name}/" in _BASELINES
        if not baseline and all(key in values for key in keys):
            users, *means = (values[key] for key in keys)
            cells = [f"{mean:.4f}" for mean in means]
            rows.append([escaped(name.replace("_", " ")), number_text(users), *cells])
    if not rows:
        return ""
    heading = "<h3>By length of history and popularity of the target item</h3>\n"
    return heading + table(("", "users", *_SLICED), rows)


# ------------------------------------------------------------------------------------- users


def _users(shown: Shown | str, titles: Mapping[str, str], split: Split, filter_seen: bool) -> str:
    """The part with users.

    Args:
      shown: see `make_page`.
      titles: see `make_page`.
      split: says which events are held out.
      filter_seen: whether items of the history are not recommended.
    """
    if not shown:
        return ""
    heading = "<h2>Some users</h2>\n"
    if isinstance(shown, str):
        return f"{heading}<p>No users are shown: {data(shown)}.</p>\n"
    if not shown.users:
        return f"{heading}<p>No users are shown: no row of the log has a history.</p>\n"
    notes = [
        f"Recommendations of the checkpoint of step {shown.step:,}, from {shown.items:,} items."
    ]
    if split.holds_out:
        which = "last event" if split.at is None else "first event after the split"
        notes.append(
            f"The model sees only the events before the {which} and should find this event's item. "
            "Items with the same score count as ranked above it."
        )
    if filter_seen:
        notes.append("Items in the user's history are left out (eval.filter_seen).")
    if shown.collisions:
        notes.append(
            f"{shown.collisions:,} ids share a bucket with another id and are shown as that id."
        )
    users = "".join(_user(user, shown.items, titles) for user in shown.users)
    return f'{heading}{_quiet(" ".join(notes))}<div class="users">{users}</div>\n'


def _user(user: ShownUser, items: int, titles: Mapping[str, str]) -> str:
    first = user.events - len(user.last) + 1
    events = "".join(_event(event, titles) for event in user.last)
    best = "".join(_recommended(one, titles) for one in user.best)
    rank = ""
    if user.rank is not None:
        rank = f"<p>The item to be found ranks {user.rank:,} of {items:,}.</p>\n"
    elif user.returns:
        rank = "<p>The item to be found is already in the user's history.</p>\n"
    return (
        f'<div class="user"><h3>row {user.row:,} of {data(user.file)}, {user.events:,} events</h3>\n'
        f'<div class="sides"><div><h4>last events, newest last</h4>\n'
        f'<ol start="{first}">{events}</ol></div>\n'
        f"<div><h4>recommended, with scores</h4>\n<ol>{best}</ol></div></div>\n{rank}</div>\n"
    )


def _event(event: Event, titles: Mapping[str, str]) -> str:
    text = "<i>no item</i>" if event.item is None else _item(event.item, titles)
    if not event.held_out:
        return f"<li>{text}</li>\n"
    note = event.held_out if event.held_out == "held out" else f"held out: {event.held_out}"
    return f'<li class="held">{text}<span class="quiet">{note}</span></li>\n'


def _recommended(one: Recommended, titles: Mapping[str, str]) -> str:
    kind = ' class="held"' if one.is_next else ""
    note = f"{one.score:.3f}{', held out: test' if one.is_next else ''}"
    return f'<li{kind}>{_item(one.item, titles)}<span class="quiet">{note}</span></li>\n'


def _item(item: str, titles: Mapping[str, str]) -> str:
    if item not in titles:
        return data(item)
    return f'{data(titles[item])}<span class="quiet">{data(item)}</span>'


# ----------------------------------------------------------------------------- configuration


def _configuration(config: Config) -> str:
    """All keys; those that differ from the schema's defaults are in bold."""
    features = [_defaults(FeatureConfig)] * len(config.features)
    standard = _flat(dataclasses.asdict(Config()) | {"features": features})
    rows = []
    for key, value in _flat(dataclasses.asdict(config)).items():
        cell = data(value if isinstance(value, str) and value else repr(value))
        changed = key not in standard or standard[key] != value
        rows.append([f"<b>{escaped(key)}</b>" if changed else escaped(key), cell])
    return (
        "<h2>Configuration</h2>\n<details><summary>all keys; changed ones in bold</summary>\n"
        f"{table(('key', 'value'), rows, 'words')}</details>\n"
    )


def _defaults(kind: Any) -> dict[str, Any]:
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Each value by its dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == "features":
            flat |= _flat(
                {str(i): feature for i, feature in enumerate(value)}, f"{prefix}features."
            )
        else:
            flat[prefix + key] = value
    return flat


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escaped(text)}</p>\n'
