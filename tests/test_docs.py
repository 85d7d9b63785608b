"""What the documentation says exists: commands, flags, keys, rooms, metrics and Python examples."""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex

import numpy as np
import pytest
import test_imports
from places import REPO

import s2s_jax
from s2s_jax import config as configs
from s2s_jax.cli import main as cli
from s2s_jax.cli.command_list import COMMANDS
from s2s_jax.config import identity, load, load_file
from s2s_jax.errors import UserError
from s2s_jax.ranking import ranking_metrics
from s2s_jax.ranking.tally import BASELINES
from s2s_jax.training.flops import AtPeak
from s2s_jax.training.meters import Meters

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_KEY = re.compile(r"(?:io|features|tables|model|lr|loss|train|eval)\.\w[\w.]*\w")


def docs_pages():
    spec = importlib.util.spec_from_file_location("docs_pages", REPO / "scripts" / "docs_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page, language):
    return [text for found, text in _BLOCK.findall(page.read_text()) if found == language]


def spans(page):
    return re.findall(r"`([^`\n]+)`", _BLOCK.sub("", page.read_text()))


def command_lines(page):
    """The lines of shell blocks that call s2s, without comments, continued lines joined."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["s2s"]:
                yield words[1:]


def of_keys(path):
    """A key as the reference names it, with NAME for the name or number of a feature or table."""
    return re.sub(r"^(features|tables)\.[^.]+\.", r"\1.NAME.", path)


@pytest.fixture(scope="module")
def reference():
    return docs_pages().configuration()


@pytest.fixture(scope="module")
def known_keys(reference):
    return set(re.findall(r"^\| `([\w.]+)`", reference, re.MULTILINE))


def test_the_reference_has_every_key(known_keys):
    # `identity` has its own list of all keys, which another test compares with the schema.
    listed = {re.sub(r"^(features|tables)\.", r"\1.NAME.", key) for key in identity.KEYS}
    assert known_keys >= listed
    assert len(known_keys) > 90


def test_the_reference_has_defaults_and_meanings(reference):
    rows = [row.split(" | ") for row in reference.splitlines() if row.startswith("| `")]
    assert all(len(row) == 4 for row in rows)
    assert all(len(meaning.strip(" |")) > 10 for *_, meaning in rows)
    defaults = {row[0].split("`")[1]: row[2].strip("`") for row in rows}
    settings = configs.Config()
    for key in ("io.shuffle_rows", "model.num_layers", "loss.temperature", "train.save_steps"):
        section, name = key.split(".")
        assert defaults[key] == str(getattr(getattr(settings, section), name))


def test_the_pages_name_keys_that_exist(known_keys):
    sections = {key.rsplit(".", 1)[0] for key in known_keys}
    for page in PAGES:
        for span in spans(page):
            for key in _KEY.findall(span):
                # Names of files, such as eval.json, are not keys.
                if re.fullmatch(r"(--)?" + re.escape(key) + r"([= …].*)?", span):
                    assert of_keys(key) in known_keys | sections, f"{page}: {span}"


class Parsed(Exception):
    """A command line was parsed; the command is not run."""


@pytest.fixture
def only_parse(monkeypatch):
    """Runs a command up to where its arguments and its configuration are read."""

    def parse(command, argv):
        module = importlib.import_module(f"s2s_jax.cli.commands.{command}")

        def stop_after(read):
            # Names of earlier versions are not accepted here, because pages must not use them.
            def read_and_stop(cls, argv, command, *_):
                found = read(cls, argv, command)
                if found is None:
                    raise UserError("help was printed")
                raise Parsed

            return read_and_stop

        for name in ("parse", "parse_with_config", "parse_with_overrides"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stop_after(getattr(module, name)))
        with pytest.raises(Parsed):
            module.main(argv)

    monkeypatch.chdir(REPO)
    return parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_lines_of_a_page_are_accepted(page, only_parse):
    for command, *argv in command_lines(page):
        if "--help" in argv:
            argv.remove("--help")
        if command not in COMMANDS:
            assert command in ("--help", "--version"), f"{page}: s2s {command}"
            continue
        # The reader's own config files have the features of base.py.
        argv = [re.sub(r"^(configs/mine\.py|FILE)$", "configs/base.py", word) for word in argv]
        try:
            only_parse(command, argv)
        except UserError as error:
            raise AssertionError(f"{page}: s2s {command} {' '.join(argv)}: {error}") from error


def flags_of(command):
    """The flags of a command without those of configuration keys, from its help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        cli.main([command, "--help"])
    return set(re.findall(r"^\W*(?:-h, )?(--\w+)(?![\w.])", shown.getvalue(), re.MULTILINE))


def test_commands_and_flags_in_the_text_exist(known_keys):
    flags = {command: flags_of(command) for command in COMMANDS}
    # --flag stands for any that is True or False.
    anywhere = set().union(*flags.values()) | {"--flag", "--help"}
    for page in PAGES:
        for span in spans(page):
            words = span.split()
            if words[0] == "s2s" and len(words) > 1 and words[1] != "COMMAND":
                assert words[1] in flags, f"{page}: {span}"
                given = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
                own = {flag for flag in given if "." not in flag}
                assert own <= flags[words[1]] | {"--help"}, f"{page}: {span}"
            elif re.match(r"--\w+($|[ =])", span):
                denied = words[0].split("=")[0].replace("--no_", "--").replace("--no-", "--")
                assert denied in anywhere, f"{page}: {span}"


def test_the_page_of_commands_has_all():
    text = (REPO / "docs" / "reference" / "commands.md").read_text()
    assert re.findall(r"^## s2s (\w+)$", text, re.MULTILINE) == list(COMMANDS)
    assert re.findall(r"^<!-- generated: command (\w+) -->$", text, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_of_a_command_has_the_flags_of_its_help(command):
    text = docs_pages().command(command)
    assert set(re.findall(r"^\| `(--\w+)`", text, re.MULTILINE)) == flags_of(command) - {"--help"}


def test_the_page_of_the_library_has_all_names():
    text = (REPO / "docs" / "reference" / "library.md").read_text()
    for name in s2s_jax.__all__:
        assert name == "__version__" or re.search(rf"`{name}`|\.{name}$", text, re.MULTILINE), name


def test_the_example_of_a_config_file_can_be_loaded(tmp_path):
    for name in ("base.py", "ml1m.py"):
        (tmp_path / name).write_text((REPO / "configs" / name).read_text())
    (block,) = blocks(REPO / "docs" / "tutorial" / "your_own_log.md", "python")
    path = tmp_path / "mine.py"
    path.write_text(block)
    assert [f.name for f in load_file(path).features] == ["item_id", "cate_id", "shop_tags"]
    load(path, ["--io.data_paths", "log"])


@pytest.mark.parametrize("name", ["features", "growing_tables"])
def test_the_parts_of_configurations_in_how_tos_can_be_made(name):
    names = {each: getattr(configs, each) for each in configs.__all__}
    shown = blocks(REPO / "docs" / "howto" / f"{name}.md", "python")
    assert shown
    for block in shown:
        exec(block, names)


def test_python_of_the_pages_uses_names_of_the_library_that_exist():
    attributes = {"s2s": set(s2s_jax.__all__), "run": set(dir(s2s_jax.Run))}
    seen = set()
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    of, name = node.value.id, node.attr
                    assert of not in attributes or name in attributes[of], f"{page}: {of}.{name}"
                    seen.add((of, name))
    assert {("s2s", "load"), ("s2s", "train"), ("run", "recommend")} <= seen


def test_the_rooms_of_the_architecture_are_those_of_the_code():
    text = (REPO / "docs" / "explanation" / "architecture.md").read_text()
    rooms = [room.rstrip("/").replace("/", ".") for room in re.findall(r"^\| `(.*?)` ", text, re.M)]
    files = ("errors", "signals", "version", "writing", "entry points")
    assert rooms == [room for room in test_imports.ORDER if room not in files]


def documented_metrics():
    text = (REPO / "docs" / "reference" / "metrics.md").read_text()
    return re.findall(r"^\| `(.*?)` ", text, re.MULTILINE)


def is_documented(key):
    for name in documented_metrics():
        pattern = re.escape(name).replace("NAME", r"[\w.-]+").replace("@K", r"@\d+")
        pattern = pattern.replace(r"length_A\-B", r"length_\d+(-\d+|\+)").replace("…", ".+")
        if re.fullmatch(pattern, key):
            return True
    return False


def test_the_metrics_of_training_are_documented():
    meters = Meters(AtPeak(step=1e-3, attended=1e-9))
    measured = {
        **dict.fromkeys(("loss", "hit_rate", "grad_norm"), 1.0),
        **dict.fromkeys(("examples", "tokens", "skipped_rows", "cut_positions"), 3),
        **{f"table/item_id/{name}": 1 for name in ("rows", "capacity", "dropped", "evicted")},
    }
    meters.add(measured, input_wait=0.1)
    line = meters.take_line(10)
    assert len(line) == 15
    assert [key for key in line if not is_documented(key)] == []


def test_the_metrics_of_evaluations_are_documented():
    values = ranking_metrics.user_values(np.array([0, 3, 500]))
    coverage = ranking_metrics.Coverage(3)
    coverage.add(np.array([[0, 1]]))
    found = ranking_metrics.summarize(values)
    found |= coverage.summarize((5, 10, 50))
    for baseline in BASELINES:
        found |= ranking_metrics.summarize(values, f"eval/{baseline}/")
    found |= ranking_metrics.by_length(values, np.array([1, 30, 1000]))
    found |= ranking_metrics.by_popularity(values, np.array([0, 1, 2]), np.array([50, 30, 20]))
    assert [key for key in found if not is_documented(key)] == []
    # Other metrics are added by the evaluation.
    source = (REPO / "s2s_jax" / "ranking" / "tally.py").read_text()
    added = re.findall(r'\{PREFIX\}(\w+)"', source)
    assert len(added) >= 6
    assert [name for name in added if not is_documented(f"eval/{name}")] == []


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (REPO / "README.md").read_text()
    assert len(text.encode()) <= 7 * 1024
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (REPO / target).exists(), target


def test_every_page_of_results_is_in_both_indices():
    pages = sorted(p.name for p in (REPO / "docs" / "results").glob("*.md") if p.stem != "index")
    for index in ("docs/results/index.md", "benchmarks/RESULTS.md"):
        listed = re.findall(r"\]\((?:\S*/)?(\w+\.md)\)", (REPO / index).read_text())
        assert sorted(set(listed)) == pages, index
