"""Any configuration comes back from JSON and from the command line."""

import dataclasses
import typing
from typing import Any, Literal

import pytest
from helpers.golden import REPO
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s_jax.config import Config, load, load_file, parse_json, validate
from s2s_jax.config.choices import kinds
from s2s_jax.errors import UserError

BASE = REPO / "configs" / "base.py"
# Keys that name something that has to exist; the others take any value of their type.
NAMES = {
    "loss.item_feature": st.sampled_from(["item_id", "cate_id"]),
    "loss.target_features": st.none() | st.lists(st.sampled_from(["item_id", "cate_id"]), min_size=1),
    "eval.metric": st.sampled_from(["mrr", "hr@5", "recall@200"]),
}  # fmt: skip


def values_of(hint: Any) -> st.SearchStrategy:
    """Any value of a type."""
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if kinds(hint):
        return st.one_of(*(made(cls) if cls else st.none() for cls in kinds(hint).values()))
    if typing.get_origin(hint) is tuple:
        first, *others = typing.get_args(hint)
        if others == [...]:
            return st.lists(values_of(first), min_size=1, max_size=3).map(tuple)
        return st.tuples(*map(values_of, typing.get_args(hint)))
    if typing.get_args(hint):
        return st.one_of(*map(values_of, typing.get_args(hint)))
    text = st.text(st.characters(exclude_categories=["C"]), max_size=9)
    return {
        int: st.integers(0, 9) | st.integers(-(2**40), 2**40),
        float: st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        # A text must not look like an address or like None.
        str: text.filter(lambda value: ":/" not in value and value != "None"),
        type(None): st.none(),
    }[hint]


def made(cls: type) -> st.SearchStrategy:
    """Any instance of a dataclass."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: values_of(hints[field.name]) for field in dataclasses.fields(cls)}
    return st.builds(cls, **fields)


def parts_of(config: Config) -> dict[str, Any]:
    """Every dataclass in a configuration, by its path."""
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    parts |= {f"features.{i}": feature for i, feature in enumerate(parts.pop("features"))}
    return parts | {f"tables.{table.name}": table for table in parts.pop("tables")}


def with_part(config: Config, path: str, part: Any) -> Config:
    section, *which = path.split(".")
    if section == "features":
        parts = [part if str(i) == which[0] else f for i, f in enumerate(config.features)]
        return dataclasses.replace(config, features=tuple(parts))
    if section == "tables":
        parts = [part if t.name == which[0] else t for t in config.tables]
        return dataclasses.replace(config, tables=tuple(parts))
    return dataclasses.replace(config, **{section: part})


@st.composite
def configs(draw) -> Config:
    """A valid configuration: any values of up to six keys, as far as they go together."""
    config = load(BASE)
    for _ in range(draw(st.integers(1, 6))):
        path = draw(st.sampled_from(sorted(parts_of(config))))
        part = parts_of(config)[path]
        hints = typing.get_type_hints(type(part))
        # Other names of features and tables would be other features and tables.
        names = [f.name for f in dataclasses.fields(part) if f.name not in ("name", "shard_name")]
        name = draw(st.sampled_from(names))
        key = f"{path}.{name}"
        value = draw(NAMES[key] if key in NAMES else values_of(hints[name]))
        value = tuple(value) if isinstance(value, list) else value
        changed = with_part(config, path, dataclasses.replace(part, **{name: value}))
        try:
            validate(changed)
        except UserError:
            continue
        config = changed
    return config


def words(key: str, value: Any) -> list[str]:
    """Arguments that set a key; of one with several kinds, the kind and all keys of it."""
    if dataclasses.is_dataclass(value):
        kind = [f"--{key}", type(value).kind]
        for field in dataclasses.fields(value):
            kind += words(f"{key}.{field.name}", getattr(value, field.name))
        return kind
    if isinstance(value, tuple):
        return [f"--{key}", *map(str, value)]
    # In this form, a text may begin with a hyphen.
    return [f"--{key}={value}"]


def arguments(before: Config, after: Config) -> list[str]:
    """The arguments that turn the configuration `before` into `after`."""
    found = []
    for path, part in parts_of(after).items():
        old = parts_of(before)[path]
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value != getattr(old, field.name):
                found += words(f"{path}.{field.name}", value)
    return found


@settings(max_examples=60, deadline=None)
@given(configs())
def test_json(config):
    assert parse_json(config.to_json()) == config


@settings(max_examples=30, deadline=None)
@given(configs())
def test_command_line(config):
    assert load(BASE, arguments(load(BASE), config)) == config


@pytest.mark.parametrize("path", sorted(REPO.glob("configs/*.py")), ids=lambda path: path.name)
def test_shipped_configs_come_back(path):
    config = load_file(path)
    assert parse_json(config.to_json()) == config
