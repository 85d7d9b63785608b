"""Every command: its help, its mistakes in one sentence, booleans and old names alike in all."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPO

from s2s_jax.cli import main as front
from s2s_jax.cli.arguments import arguments_of
from s2s_jax.cli.command_list import COMMANDS
from s2s_jax.cli.parsing import WithConfig, parse, parse_with_config
from s2s_jax.config import Config
from s2s_jax.errors import UserError
from s2s_jax.version import __version__

CONFIG = str(REPO / "configs" / "quickstart.py")
WITH_CONFIG = (
    "train", "evaluate", "recommend", "export", "checkpoint", "catalogue", "inspect", "config", "batch",
)  # fmt: skip
SECTIONS = ("io", "model", "lr", "loss", "train", "eval")


def arguments_class(command: str) -> type:
    module = importlib.import_module(f"s2s_jax.cli.commands.{command}")
    return vars(module)["Arguments" if "Arguments" in vars(module) else "Settings"]


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    """Runs the command in a new process."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "200"}
    command = [sys.executable, "-m", "s2s_jax", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, **more
    )


def mistake(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        front.main(list(arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- help


def test_every_module_with_a_main_is_a_command():
    modules = {path.stem for path in (Path(front.__file__).parent / "commands").glob("*.py")}
    assert modules - {"__init__"} == set(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_in_a_line(flag, capsys):
    assert front.main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command, text in COMMANDS.items():
        assert [line.split(None, 1)[1] for line in lines if line.startswith(f"  {command} ")] == [
            text
        ]
        assert len(text) < 90


def test_the_version(capsys):
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"s2s_jax {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_all_its_arguments(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert front.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert COMMANDS[command] in shown
    assert shown.startswith("usage: ")
    assert shown.count("usage: ") == 1
    positions = []
    for argument in arguments_of(arguments_class(command)).values():
        where = shown.find(argument.shown if argument.positional else f"--{argument.name} ")
        assert where > 0, argument.name
        positions.append(where)
    # Keys of the configuration come after the flags, and only in commands that take a configuration.
    assert ("--io.batch_size" in shown) == (command in WITH_CONFIG)
    if command in WITH_CONFIG:
        assert max(positions) < shown.index("--io.")
        for section in SECTIONS:
            assert f"--{section}." in shown


def test_help_of_keys_has_the_values_of_the_file(capsys):
    assert front.main(["evaluate", "--help", "--config", CONFIG]) == 0
    match = re.search(r"--train\.output_dir[^(]*\(default: ([^)]*)\)", capsys.readouterr().out)
    assert match is not None
    assert match[1].replace("│", "").split() == ["runs/quickstart"]


def test_every_argument_is_documented():
    for command in COMMANDS:
        cls = arguments_class(command)
        assert cls.__doc__
        for base in cls.__mro__[:-1]:
            text = Path(sys.modules[base.__module__].__file__).read_text()
            body = text.split(f"class {base.__name__}")[1]
            for name in vars(base)["__annotations__"] if "__annotations__" in vars(base) else ():
                assert re.search(rf'    {name}: [^\n]*\n    """\w', body), f"{command}: {name}"


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["expected a command", "train, evaluate", "found nothing"]),
        (["trian"], ["expected a command", "found trian", "did you mean train?"]),
        (["xyz"], ["found xyz", "s2s --help"]),
        (["train"], ["--config: expected a path, found nothing", "s2s train --config FILE"]),
        (["train", "--config"], ["--config: expected a path, found nothing"]),
        (["train", "--conifg", CONFIG], ["--conifg: no such option", "did you mean --config?"]),
        (["train", "--config", CONFIG, "--batch_size", "3"], ["did you mean --io.batch_size?"]),
        (["train", "--config", CONFIG, "--io.batchsize", "3"], ["did you mean io.batch_size?"]),
        (["train", "--config", CONFIG, "--io.batch_size", "x"], ["a whole number, found x"]),
        (["train", "--config", CONFIG, "x"], ["x: expected a flag before it"]),
        (["train", "-config", CONFIG], ["-config: no such option", "did you mean --config?"]),
        (["train", "--config", "none.py"], ["--config: none.py does not exist or is not a file"]),
        (["evaluate", "--config", CONFIG, "--split", "all"],
         ["--split: expected one of test, validation, found all"]),
        (["evaluate", "--config", CONFIG, "--spilt", "test"], ["did you mean --split?"]),
        (["recommend", "--config", CONFIG], ["--input: expected text, found nothing",
                                             "s2s recommend --config FILE --input INPUT --output"]),
        (["recommend", "--config", CONFIG, "--top_k", "many"], ["--top_k: ", "found many"]),
        (["recommend", "--config", CONFIG, "--input", "l", "--output", "o", "--top_k", "many"],
         ["--top_k: expected a whole number, found many"]),
        (["report"], ["RUN_DIR: expected a path, found nothing", "give s2s report RUN_DIR"]),
        (["report", "a", "b"], ["b: expected a flag before it"]),
        (["report", "a", "--users", "-1"], ["--users: ", "found -1"]),
        (["convert"], ["FILE_OR_DIR …: ", "give s2s convert FILE_OR_DIR … --output OUTPUT"]),
        (["convert", "a"], ["--output: expected a path, found nothing"]),
        (["convert", "a", "--output", "b", "--on_error", "go"], ["stop, skip, found go"]),
        (["convert", "a", "--output", "b", "--merge=maybe"], ["True or False, found maybe"]),
        (["convert", "a", "--output", ""], ["--output: expected a path, found nothing"]),
        (["convert", "a", "--output", "b", "--features"], ["--features: ", "found nothing"]),
        (["convert", "a", "--output", "b", "--hlep"], ["did you mean --help?"]),
        (["inspect"], ["FILE_OR_DIR …: expected one or more", "s2s inspect FILE_OR_DIR …"]),
        (["inspect", "a", "--io.batch_size", "3"], ["--io.batch_size: expected --config FILE"]),
        (["inspect", "a", "--rows", "1.5"], ["--rows: expected a whole number, found 1.5"]),
        (["catalogue", "--config", CONFIG], ["--output: expected a path, found nothing"]),
        (["synthesize", "--output", "a", "--zipf", "steep"], ["--zipf: expected a number"]),
        (["synthesize", "--output", "a", "--seed", "-1"], ["--seed: expected at least 0"]),
        (["synthesize", "--output", "a", "b"], ["b: expected a flag before it"]),
        (["tables"], ["RUN_DIR: expected a path, found nothing"]),
        (["tables", "run", "--evicted_since", "x"], ["a whole number, found x"]),
        (["tables", "run", "--no_look_up"], ["--no_look_up: no such option"]),
        (["config"], ["FILE: expected a path, found nothing", "give s2s config FILE"]),
        (["config", CONFIG, "--model.nhead", "3"], ["model.nhead", "found 3"]),
        (["config", CONFIG, "--nhead", "3"], ["did you mean --model.nhead?"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = mistake(*arguments)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        c if c in ("train", "serve", "config") else pytest.param(c, marks=pytest.mark.slow)
        for c in COMMANDS
    ],
)
def test_a_wrong_flag_ends_every_command_with_2_and_a_line(command):
    done = run(command, "--no-such-flag")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --no-such-flag: no such option; ")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------- what is taken for what


@dataclasses.dataclass(frozen=True, kw_only=True)
class Some(WithConfig):
    """Arguments of all kinds."""

    many: tuple[str, ...] = ()
    """Several"""
    number: int | None = None
    """A number"""
    text: str = "a"
    """A text"""
    yes: bool = False
    """A boolean"""
    maybe: bool | None = None
    """One that may be open"""


@pytest.fixture
def some(monkeypatch):
    monkeypatch.setitem(COMMANDS, "some", "Does something.")

    def parsed(*arguments: str) -> Some:
        words = ["--config", CONFIG, *arguments]
        found = parse_with_config(Some, words, "some", {"word": "text"})
        assert found is not None
        return found[0]

    return parsed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--yes"], True), (["--yes", "True"], True), (["--yes", "true"], True),
        (["--yes=True"], True), (["--yes", "False"], False), (["--yes=false"], False),
        (["--no_yes"], False), (["--no-yes"], False), (["--yes", "--number", "3"], True), ([], False),
    ],
)  # fmt: skip
def test_booleans(some, words, expected):
    assert some(*words).yes is expected
    assert some("--yes", *words).yes is (expected if words else True)
    changed = [word.replace("yes", "maybe") for word in words]
    assert some(*changed).maybe is (expected if words else None)


def test_values(some):
    assert some("--number", "-3").number == -3
    assert some("--number=-3").number == -3
    assert some("--text", "-x").text == "-x"
    assert some("--text=--x").text == "--x"
    assert some("--text", "").text == ""
    assert some("--text=a=b").text == "a=b"
    assert some("--many", "a", "-1", "--number", "1").many == ("a", "-1")
    assert some("--many=a").many == ("a",)
    assert some("--word", "b").text == "b"
    # The last one counts, so that a line in a script can be added to.
    assert some("--number", "1", "--number", "2").number == 2


def test_overrides_may_stand_between():
    words = ["--io.batch_size", "3", "--config", CONFIG, "--number", "2", "--lr.dense_lr=0.5"]
    found = parse_with_config(Some, words, "some")
    assert found is not None
    arguments, config = found
    assert (arguments.number, config.io.batch_size, config.lr.dense_lr) == (2, 3, 0.5)


def test_a_boolean_before_what_has_no_flag():
    from s2s_jax.data.conversion.convert import Settings

    found = parse(Settings, ["--merge", "a log", "--output", "b", "--overwrite"], "convert")
    assert found is not None
    assert (found.paths, found.merge, found.overwrite) == (("a log",), True, True)
    found = parse(Settings, ["--merge", "True", "a", "b", "--output", "c"], "convert")
    assert found is not None
    assert (found.paths, found.merge) == (("a", "b"), True)
    found = parse(Settings, ["--output", "c", "--features", "x", "--merge", "a"], "convert")
    assert found is not None
    assert (found.paths, found.features) == (("a",), ("x",))


# ------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("words", [[CONFIG], ["--config", CONFIG]])
def test_config_prints_what_the_file_resolves_to(words, capsys):
    assert front.main(["config", *words, "--io.batch_size", "77", "--train.train_epoch=3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) >= {field.name for field in dataclasses.fields(Config)}
    assert printed["io"]["batch_size"] == 77
    assert printed["train"]["train_epoch"] == 3
    assert printed["train"]["output_dir"] == "runs/quickstart"


def test_old_names_are_taken(tmp_path, capsys):
    log = str(tmp_path / "log")
    small = ["--users", "10", "--items", "80", "--files", "1"]
    assert front.main(["synthesize", "--out", log, *small]) == 0
    assert front.main(["convert", log, "--layout", "orc", "--out", log + "2"]) == 0
    events = tmp_path / "a.csv"
    events.write_text("who,when,item_id\n1,2,3\n")
    words = ["--user", "who", "--time", "when", "--features", "item_id"]
    assert front.main(["convert", str(events), "--out", log + "3", *words]) == 0
    assert "wrote 1 file with 1 user and 1 event" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["config", CONFIG]]
    + [[c, "--help"] for c in ("convert", "inspect", "synthesize", "catalogue", "config")],
    ids=" ".join,
)
def test_commands_that_need_no_devices_do_not_import_jax(arguments):
    program = (
        "import sys\nsys.argv[:1] = ['s2s']\nfrom s2s_jax.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\nassert 'jax' not in sys.modules, 'jax is imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_that_does_not_listen_itself(number):
    """The signal raises an exception instead of killing the process, so unfinished files are removed."""
    program = (
        "import os, signal, sys\nfrom s2s_jax import signals\n"
        "from s2s_jax.cli.exit import run_command\nsignals.handle_while_starting()\n"
        "def main(_):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)}); signal.pause()\n"
        "    finally:\n        print('cleaned up')\n"
        "run_command(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (75, "cleaned up\n")
    assert done.stderr == f"stopped by {number.name}; start again\n"
