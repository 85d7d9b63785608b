"""Every command refuses addresses of unknown stores by name, for every option and key.

Those of known ones are refused, too, where a file must be on this machine.
"""

import dataclasses
import importlib
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest
import small
from places import REPO

from s2s_jax import config as configs
from s2s_jax.cli.arguments import Argument, arguments_of
from s2s_jax.cli.command_list import COMMANDS
from s2s_jax.config import IN_STORES, Config, FeatureConfig, refuse_addresses, validate
from s2s_jax.data.logs.files import find
from s2s_jax.errors import UserError
from s2s_jax.jobs.train import train

EVERY = sorted(COMMANDS)
# Required arguments of each command; their values are never used.
NEEDED = {
    "train": [],
    "evaluate": [],
    "recommend": ["--input", "log", "--output", "out"],
    "export": ["--output", "out"],
    "checkpoint": ["to-torch", "run", "--output", "out"],
    "report": ["run"],
    "serve": ["export"],
    "tables": ["run"],
    "catalogue": ["--output", "out"],
    "convert": ["log", "--output", "out"],
    "inspect": ["log"],
    "init": ["log", "--output", "out"],
    "synthesize": ["--output", "out"],
    "config": [],
    "batch": [],
}
CONFIG = str(REPO / "configs/quickstart.py")


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f"s2s_jax.cli.commands.{command}")


def arguments_of_command(command: str) -> dict[str, Argument]:
    module = module_of(command)
    names = [name for name in ("Arguments", "Settings", "WithConfig") if name in vars(module)]
    return arguments_of(vars(module)[names[0]])


def options_of(command: str) -> list[Argument]:
    """The options of a command that take a text or a path."""
    return [
        a for a in arguments_of_command(command).values() if re.search(r"\bstr\b|Path", str(a.kind))
    ]


def run(command: str, option: Argument, value: str) -> UserError:
    needed = list(NEEDED[command])
    flag = f"--{option.name}"
    arguments = arguments_of_command(command)
    if option.positional:
        place = [a.name for a in arguments.values() if a.positional].index(option.name)
        needed = [*needed[:place], value, *needed[place + 1 :]]
    elif flag in needed:
        needed[needed.index(flag) + 1] = value
    else:
        needed += [flag, value]
    if "config" in arguments and option.name != "config" and arguments["config"].required:
        needed = ["--config", CONFIG, *needed]
    with pytest.raises(UserError) as caught:
        module_of(command).main(needed)
    return caught.value


def test_the_commands_are_known():
    assert sorted(NEEDED) == EVERY


@pytest.mark.parametrize("command", EVERY)
def test_every_option_of_every_command_refuses_them(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = options_of(command)
    assert options
    for option in options:
        known = option.may_be_in_store or option.place in IN_STORES
        address = "abfss://bucket/a" if known else "gs://bucket/a"
        message = str(run(command, option, address))
        assert message.startswith(f"{option.place}: "), message
        assert address in message
        assert "mount" in message
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_in_a_store():
    """What the documentation promises; `--output` of other commands, for example, is not among it."""
    found = {
        f"{command} {option.place}"
        for command in EVERY
        for option in options_of(command)
        if option.may_be_in_store or option.place in IN_STORES
    }
    assert found == {
        "catalogue --output",
        "checkpoint --output",
        "checkpoint RUN_DIR_OR_FILE",
        "convert --output",
        "convert FILE_OR_DIR …",
        "evaluate --output",
        "export --catalogue",
        "export --item_columns",
        "export --output",
        "export --titles",
        "init FILE_OR_DIR …",
        "inspect FILE_OR_DIR …",
        "recommend --catalogue",
        "recommend --input",
        "recommend --output",
        "report --output",
        "report --titles",
        "report RUN_DIR",
        "serve DIR",
        "synthesize --output",
        "tables RUN_DIR",
    }


def text_keys() -> list[str]:
    config = Config(features=(FeatureConfig(name="item_id", hash_bucket_size=10),))
    return [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(config)
        if section.name not in ("features", "tables")
        for key in dataclasses.fields(getattr(config, section.name))
        if re.search(
            r"\bstr\b|Path",
            str(typing.get_type_hints(type(getattr(config, section.name)))[key.name]),
        )
    ]


@pytest.mark.parametrize("key", text_keys())
def test_every_key_refuses_them(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = "az://bucket/a" if key in IN_STORES else "s3://bucket/a"
    with pytest.raises(UserError, match=rf"{key}: .*{address}"):
        module_of("train").main(["--config", CONFIG, f"--{key}", address])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", CONFIG, "--train.output_dir"],
        ["train", "--config", CONFIG, "--io.data_paths"],
        ["train", "--config"],
        ["evaluate", "--config", CONFIG, "--output"],
        ["inspect"],
        ["serve"],
    ],
)
@pytest.mark.parametrize(
    "address",
    ["s3://KEY:hidden@bucket/run", "GS://hidden@b", "s3:/KEY:hid/den@b", "s3://b:hidden/x"],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(words, address):
    with pytest.raises(UserError, match="://BUCKET/KEY, found : or @") as caught:
        module_of(words[0]).main([*words[1:], address])
    assert "hid" not in str(caught.value)
    assert "KEY:" not in str(caught.value)


def test_keys_of_paths_are_among_them():
    assert {"io.data_paths", "io.cache", "loss.catalogue", "train.output_dir"} <= set(text_keys())


@pytest.mark.parametrize(
    "address",
    [
        "gs://b/x",
        "gs:/b/x",
        "S3://b",
        "s3a://b/x",
        "hdfs://name:8020/log",
        "hdfs:///log",
        "abfss://c@a.dfs.core.windows.net/x",
        "https://host/x.orc",
        "http:/host/x.orc",
        "new-store+v2://b/x",
        "/here/a.orc, gs://b/x",
        ["a.orc", "gs://b/x"],
        Path("gs://b/x"),
    ],
)
def test_what_is_an_address(address):
    with pytest.raises(
        UserError, match=r"^--x: expected a path of this machine, found the address"
    ):
        refuse_addresses("--x", address)


@pytest.mark.parametrize(
    "address", ["file:///data/log", "file:/data/log", "file://localhost/data/log"]
)
def test_addresses_of_local_files_name_the_path(address):
    with pytest.raises(UserError, match=r"give /data/log$"):
        refuse_addresses("--x", address)


@pytest.mark.parametrize(
    "path",
    [
        "a:b.orc", "C:", "C:/log", "2020-01-01T12:00", "a/b:c/d", "./gs:/x", "x:/y", "/data//gs:/x",
        "~/log", "", None, 3, Path("a:b"), ("a", "b:c"), "12:/x",
    ],
)  # fmt: skip
def test_paths_that_are_not_addresses(path):
    refuse_addresses("--x", path)


def test_a_folder_whose_name_looks_like_one_is_read_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("team", "s3"):
        (tmp_path / f"{name}:").mkdir()
    refuse_addresses("--x", "team:/log")
    for address in ("team://log", "s3:/log", "other:/log"):
        with pytest.raises(UserError):
            refuse_addresses("--x", Path(address) if "//" not in address else address)


def test_files_with_colons_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:").mkdir()
    small.write_log(tmp_path / "C:", 4)
    (file, *_) = sorted((tmp_path / "C:").glob("*.orc"))
    file.rename("a:b.orc")
    assert find(["a:b.orc"]).files == [Path("a:b.orc")]


def test_a_program_that_calls_train_gets_the_same_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configs.load(CONFIG)
    for key, section in (("output_dir", "train"), ("data_paths", "io")):
        changed = dataclasses.replace(getattr(config, section), **{key: "gs:/bucket/x"})
        with pytest.raises(UserError, match=rf"{section}.{key}: .*gs://bucket/x"):
            train(dataclasses.replace(config, **{section: changed}))
    assert not (tmp_path / "gs:").exists()
    with pytest.raises(UserError, match=r"train\.output_dir"):
        validate(
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, output_dir="az://b")
            )
        )
    with pytest.raises(UserError, match="--config"):
        configs.load_file("gs://bucket/config.py")
