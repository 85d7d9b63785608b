"""The rules of a first configuration."""

import dataclasses

import hypothesis
import plans
import pytest
from hypothesis import strategies as st
from places import REPO

from s2s_jax.config import load_file, validate
from s2s_jax.planning import rules
from s2s_jax.planning.rules import plan
from s2s_jax.training.growth import GrowthPlan


def config_of(log, machine=plans.CPU, budget=None):
    return plan(log, machine, "runs/mine", budget).config


@hypothesis.given(log=plans.logs(), machine=plans.machines, budget=st.none() | st.floats(0.1, 1e5))
@hypothesis.settings(max_examples=60)
def test_any_log_gives_a_configuration_that_passes_all_checks(log, machine, budget):
    made = plan(log, machine, "runs/mine", budget)
    validate(made.config)
    assert made.config.io.data_paths == log.paths
    assert made.config.features[0].name == made.config.loss.item_feature == log.item.name
    # What differs between events of an item is not known when recommending.
    of_item = {c.name for c in log.columns if c.of_item} | {log.item.name}
    assert set(made.config.target_features) <= of_item
    names = {f.name for f in made.config.features}
    for column in log.columns:
        assert column.name in names or f"Not used: {column.name} (" in made.why["features"]
    # Tables fit into the memory of the machine.
    for feature, table in zip(made.config.features, made.config.tables, strict=True):
        rows = table.capacity if feature.grows else feature.hash_bucket_size
        assert rows <= 4_096 or 12 * feature.emb_dim * rows <= machine.memory
        assert feature.bag_size >= next(
            c.largest_bag for c in (log.item, *log.columns) if c.name == feature.name
        )


def test_movielens_gets_what_was_measured_on_it():
    made, measured = config_of(plans.log()), load_file(REPO / "configs" / "ml1m.py")
    assert made.model == measured.model
    assert made.lr == measured.lr
    assert made.io.batch_size == measured.io.batch_size
    assert made.io.sequences == measured.io.sequences
    assert made.eval.split == measured.eval.split
    assert made.eval.neighbours == "auto"
    assert made.train.train_epoch == measured.train.train_epoch
    assert made.target_features == measured.target_features
    dims = {f.name: f.emb_dim for f in measured.features}
    assert {f.name: f.emb_dim for f in made.features} == dims
    assert {t.name: t.init_std for t in made.tables} == {
        t.name: t.init_std for t in measured.tables
    }
    # All items are negatives in both.
    assert made.loss.negatives == "full"
    assert measured.loss.num_negatives >= 3_416


@pytest.mark.parametrize(
    ("share", "filtered", "words"),
    [
        (0.0, True, None),
        (0.04, True, None),
        (0.2, True, "20%"),
        (0.5, False, "50%"),
        (1, False, "100%"),
    ],
)
def test_users_who_return_to_items(share, filtered, words):
    made = plan(plans.log(returning=share), plans.CPU, "runs/mine", None)
    assert made.config.eval.filter_seen is filtered
    assert ("eval.filter_seen" in made.why) is (words is not None)
    if words is not None:
        assert words in made.why["eval.filter_seen"]


def test_short_histories_get_short_sequences_and_as_many_positions():
    made = config_of(plans.log(mean=8.4, most_have=12, longest=12, rows=20_000))
    assert made.model.seq_len == 16
    assert made.io.batch_size == 100
    assert made.io.sequences.windows == 1
    assert made.eval.neighbours == "auto"
    assert made.model.event_dropout > 0
    assert [t.init for t in made.tables] == ["neighbours", "normal", "normal"]


@pytest.mark.parametrize(
    ("most_have", "expected"), [(1, 16), (16, 16), (17, 32), (129, 200), (201, 200), (10**6, 200)]
)
def test_sequences_cover_95_percent_of_the_rows_up_to_a_limit(most_have, expected):
    assert config_of(plans.log(most_have=most_have, longest=10**6)).model.seq_len == expected


def test_every_event_of_a_long_row_is_in_a_window_up_to_a_limit():
    for longest in (16, 17, 31, 32, 46, 170, 5_000):
        made = config_of(plans.log(mean=8, most_have=12, longest=longest))
        windows, seq_len = made.io.sequences.windows, made.model.seq_len
        covered = windows * (seq_len - 1) + 1
        assert covered >= longest or windows == rules.MOST_WINDOWS
        assert windows == 1 or (windows - 1) * (seq_len - 1) + 1 < longest


def test_negatives_depend_on_the_number_of_items_and_the_size_of_the_log():
    def loss(items, **changes):
        return config_of(plans.log(items=items, **changes)).loss

    assert loss(20_000).negatives == "full"
    assert (loss(20_001).negatives, loss(20_001).num_negatives) == ("uniform", 4_096)
    assert (loss(2_000_000).negatives, loss(2_000_000).log_q) == ("in_batch", "stream")
    # 10^10 events cannot be counted in a part of 90 minutes, so no catalogue may be needed.
    huge = config_of(plans.log(rows=10**8, events=10**10))
    assert (huge.loss.negatives, huge.loss.log_q) == ("in_batch", "stream")
    assert not huge.loss.needs_catalogue
    assert huge.eval.every_steps is None
    assert huge.eval.neighbours == 0
    assert {table.init for table in huge.tables} == {"normal"}
    assert config_of(plans.log(rows=10**8, events=10**10), budget=10**5).eval.every_steps == "auto"


def test_useless_columns_are_left_out_with_the_reason():
    log = plans.log(
        columns=(
            plans.column("always", 1),
            plans.column("event", 900_000, repeats=1.1),
            plans.column("words", 5_000, largest_bag=200),
            plans.column("tags", 5_000, largest_bag=5),
        ),
        unusable=(("price", "no ids"),),
    )
    made = plan(log, plans.CPU, "runs/mine")
    assert [(f.name, f.bag_size) for f in made.config.features] == [("item_id", 1), ("tags", 5)]
    for name in ("always", "event", "words", "price"):
        assert f"Not used: {name} (" in made.why["features"]
    # Stripes that were not read may have larger bags, which training would refuse.
    sampled = config_of(dataclasses.replace(log, sampled=True))
    assert sampled.feature("tags").bag_size == 10


def test_tables_grow_unless_there_are_too_many_ids_or_too_little_memory():
    def item(distinct, machine=plans.CPU):
        made = config_of(plans.log(items=distinct), machine)
        return made.features[0].hash_bucket_size

    assert item(1_000_000) == 0
    assert item(5_000_000) > 0  # 12 x 128 x 8.4 million bytes are half of 24 GB.
    assert item(5_000_000, plans.GPU) == 0
    assert item(100_000_000, plans.GPU) > 0


@pytest.mark.parametrize("items", [30, 900, 3_416, 9_691, 60_000, 900_000])
def test_a_table_never_has_to_grow(items):
    made = config_of(plans.log(items=items))
    growth = GrowthPlan(made.features, made.tables)
    capacities = dict(growth.capacities)
    rows = dict.fromkeys(capacities, 0)
    # With all items as negatives, the first step has all of them; otherwise a few thousand.
    new = {"full": items, "uniform": 1_600 + 4_096}[made.loss.negatives]
    for step in range(1, 200):
        for name in rows:
            most = {"item_id": items, "cate_id": 18, "behavior_id": 5}[name]
            rows[name] = min(rows[name] + new, most)
        growth.update(
            step,
            {f"table/{n}/rows": rows[n] for n in rows}
            | {f"table/{n}/capacity": capacities[n] for n in rows}
            | {f"table/{n}/dropped": 0 for n in rows},
        )
    assert growth.capacities == capacities


def test_small_logs_get_more_epochs():
    few = config_of(plans.log(mean=8, most_have=12, longest=12, rows=600, events=4_800))
    # 4,800 events fill 85% of the 1,600 positions of 3.5 steps.
    assert few.train.train_epoch >= rules.LEAST_STEPS / 4
    many = config_of(plans.log(mean=8, most_have=12, longest=12, rows=10**6, events=8 * 10**6))
    assert many.train.train_epoch == rules.SHORT.epochs


def test_names_that_cannot_be_those_of_tables_get_another():
    names = ("shop type", "shop_type", "shop:type")
    made = config_of(plans.log(columns=tuple(plans.column(name, 9) for name in names)))
    assert [f.name for f in made.features[1:]] == list(names)
    tables = [f.table_name for f in made.features]
    assert len(set(tables)) == 4
    assert made.feature("shop_type").table_name == "shop_type"
