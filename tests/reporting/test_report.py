"""The report page: it agrees with the run's files, and stays valid whatever they contain."""

import dataclasses
import html.parser
import itertools
import json
import math
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import of_config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from evaluations import cut, evaluating, user_vector
from jobs_of import lines, one_device
from pyarrow import orc

from s2s_jax.cli.commands import report
from s2s_jax.cli.exit import run_command
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import EvalConfig
from s2s_jax.config.settings import Items
from s2s_jax.data.items.catalogue import item_text
from s2s_jax.data.items.titles import read_titles
from s2s_jax.errors import UserError
from s2s_jax.jobs.report import show_users
from s2s_jax.jobs.train import train
from s2s_jax.ranking.encode import item_vectors
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.restored import restore
from s2s_jax.reporting.charts import Chart, Series, figure, thinned
from s2s_jax.reporting.markup import escaped
from s2s_jax.reporting.record import read_record
from s2s_jax.reporting.report_page import make_page
from s2s_jax.reporting.shown_users import Event, Recommended, Shown, ShownUser
from s2s_jax.runs.checkpoints.files import checkpoint_fingerprint

HOSTILE = "<script>alert('1')</script>&amp;\"><b>\x00\ud800]]>{}%s\u202e\n"
VOID = {"meta", "br", "line", "circle", "rect", "polyline"}


class Strict(html.parser.HTMLParser):
    """Parses a page as a browser does, but tags must be closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.open, self.texts = set(), [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def checked(page: str) -> ET.Element:
    """The page as a tree, after checks that apply to every page."""
    seen = Strict(page)
    assert not seen.tags & {"script", "img", "link", "iframe", "object", "a", "base", "form"}
    assert "url(" not in page
    assert "@import" not in page
    return ET.fromstring(page)


def text(element: ET.Element) -> str:
    return "".join(element.itertext())


def number(label: str) -> float:
    factors = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    if label[-1] in factors:
        return float(label[:-1]) * factors[label[-1]]
    return float(label)


def figures(page: ET.Element) -> dict[str, ET.Element]:
    """The figures by title."""
    return {f.find("figcaption").text: f for f in page.iter("figure")}


def axis(svg: ET.Element, kind: str, log: bool) -> list[float]:
    """Slope and intercept that turn places into values (or their logarithms), from the ticks."""
    labels = [element for element in svg.iter("text") if element.get("class") == kind]
    values = np.array([number(element.text) for element in labels])
    places = np.array([float(element.get(kind)) for element in labels])
    places -= 4 if kind == "y" else 0
    if len(values) == 1:
        return [0.0, values[0]]
    values = np.log10(values) if log else values
    fitted = np.polyfit(places, values, 1)
    np.testing.assert_allclose(np.polyval(fitted, places), values, atol=1e-3 * np.ptp(values))
    return list(fitted)


def drawn(element: ET.Element, log: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each curve, from the places of its points relative to the ticks."""
    svg = element.find("svg")
    curves = []
    for line in svg.iter("polyline"):
        points = np.array([pair.split(",") for pair in line.get("points").split()], float)
        x, y = np.polyval(axis(svg, "x", False), points[:, 0]), points[:, 1]
        y = np.polyval(axis(svg, "y", log), y)
        curves.append((x, 10**y if log else y))
    return curves


def hovered(element: ET.Element) -> dict[float, dict[str, float]]:
    """The tooltips: for each step, the value of each curve."""
    found = {}
    for title in element.iter("title"):
        (step, *values) = title.text.replace(",", "").split("\n")
        pairs = [value.rsplit(" ", 1) for value in values]
        found[float(step.removeprefix("step "))] = {name: float(x) for name, x in pairs}
    return found


# ------------------------------------------------------------------------------------ charts


@pytest.mark.parametrize("points", [0, 1, 2, 499, 500, 501, 1234, 100_000])
def test_thinning_keeps_extremes(points):
    y = np.random.default_rng(points).normal(size=points).cumsum()
    if points > 10:
        y[points // 3], y[points // 2] = 1e6, -1e6
    kept = thinned(y)
    assert len(kept) <= 500
    assert (np.diff(kept) > 0).all()
    if points <= 500:
        assert kept.tolist() == list(range(points))
    else:
        assert {0, points - 1, points // 3, points // 2} <= set(kept.tolist())


SHAPES = {
    "one": [3.0],
    "two": [1.0, 2.0],
    "flat": [7.25] * 30,
    "zeros": [0.0] * 5,
    "negative": [-3.0, -2.5, -11.0, 4.0],
    "huge": [1e12, 3.5e13, 2e13],
    "tiny": [1e-9, 2e-9, 1.5e-9],
    "near": [5000.01, 5000.02, 5000.015],
    "spread": [0.003, 12.0, 4567.0, 1e-5],
    "walk": (np.random.default_rng(0).normal(size=3000).cumsum() ** 2 + 0.1).tolist(),
}


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_points_agree_with_ticks(name, from_zero):
    y = np.array(SHAPES[name])
    x = 10.0 * np.arange(1, len(y) + 1)
    element = ET.fromstring(figure(Chart("v", (Series("v", x, y),), from_zero=from_zero)))
    check_chart(element, x, y, log=False)
    ticks = [number(t.text) for t in element.iter("text") if t.get("class") == "y"]
    assert 2 <= len(ticks) <= 9
    assert len(set(ticks)) == len(ticks)
    assert ticks[0] <= y.min()
    assert y.max() <= ticks[-1]
    if from_zero and y.min() >= 0:
        assert ticks[0] == 0


@pytest.mark.parametrize("name", ["one", "two", "flat", "huge", "tiny", "spread", "walk"])
def test_logarithmic_axes(name):
    y = np.array(SHAPES[name])
    x = np.arange(len(y)) * 1.0
    check_chart(ET.fromstring(figure(Chart("v", (Series("v", x, y),), log=True))), x, y, log=True)


def check_chart(element, x, y, log):
    kept = thinned(y)
    ((found_x, found_y),) = drawn(element, log)
    np.testing.assert_allclose(found_x, x[kept], atol=2e-3 * max(np.ptp(x), 1))
    if log:
        np.testing.assert_allclose(found_y, y[kept], rtol=2e-3 * math.log(1e12))
    else:
        ticks = [number(t.text) for t in element.iter("text") if t.get("class") == "y"]
        np.testing.assert_allclose(found_y, y[kept], atol=1e-3 * (ticks[-1] - ticks[0]))
    tooltips = hovered(element)
    assert list(tooltips) == x[kept].tolist()
    np.testing.assert_allclose([of["v"] for of in tooltips.values()], y[kept], rtol=1e-4)


def test_what_is_not_finite_is_left_out_and_counted():
    x, y = np.arange(6.0), np.array([1.0, np.nan, 3.0, np.inf, -np.inf, 2.0])
    element = ET.fromstring(figure(Chart("v", (Series("v", x, y),))))
    assert list(hovered(element)) == [0, 2, 5]
    assert "not finite are not drawn: 3." in text(element)
    assert "nan" not in ET.tostring(element, "unicode").lower()
    assert figure(Chart("v", (Series("v", x[1:2], y[1:2]),))) == ""
    assert figure(Chart("v", (Series("v", x[:0], y[:0]),))) == ""
    element = ET.fromstring(figure(Chart("v", (Series("v", x, np.arange(-2.0, 4)),), log=True)))
    assert list(hovered(element)) == [3, 4, 5]
    assert "not finite and positive are not drawn: 3." in text(element)


def test_two_curves_of_different_steps_share_axes():
    first = Series("a<b", np.array([1.0, 2, 3]), np.array([5.0, 6, 7]))
    second = Series("c", np.array([2.0, 4]), np.array([60.0, 70]))
    element = ET.fromstring(figure(Chart("both", (first, second))))
    tooltips = hovered(element)
    assert tooltips == {1: {"a<b": 5}, 2: {"a<b": 6, "c": 60}, 3: {"a<b": 7}, 4: {"c": 70}}
    for (x, y), series in zip(drawn(element), (first, second), strict=True):
        np.testing.assert_allclose(x, series.x_P, atol=0.01)
        np.testing.assert_allclose(y, series.y_P, atol=0.1)
    strips = [(float(r.get("x")), float(r.get("width"))) for r in element.iter("rect")]
    for (begin, width), (next_begin, _) in itertools.pairwise(strips):
        assert begin + width == pytest.approx(next_begin, abs=0.11), "no step is out of reach"


# -------------------------------------------------------------------------- pages without runs


def fake_run(directory: Path, config=None, written=(), **changes) -> Path:
    """A run directory without checkpoints."""
    config = small.config() if config is None else config
    settings = {"output_dir": str(directory), "train_steps": 500} | changes
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(config.to_json())
    (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in written))
    return directory


def training_line(step: int, **more) -> dict:
    rng = np.random.default_rng(step)
    names = ("loss", "hit_rate", "grad_norm", "examples_per_sec", "tokens_per_sec")
    line = {"step": step} | {name: float(rng.uniform(0.1, 9)) for name in names}
    return line | {"step_ms": 8.0, "input_wait_ms": 2.0} | more


def page_of(run_dir: Path, *arguments: str) -> ET.Element:
    assert report.main([str(run_dir), *arguments]) == 0
    return checked((run_dir / "report.html").read_text())


def test_curves_show_the_metrics(tmp_path):
    written = [training_line(10 * i, mfu=0.25) for i in range(1, 40)]
    page = page_of(fake_run(tmp_path / "run", written=written), "--users", "0")
    found = figures(page)
    for title, key in (
        ("loss", "loss"),
        ("hit rate", "hit_rate"),
        ("tokens/s", "tokens_per_sec"),
        ("MFU", "mfu"),
    ):
        tooltips = hovered(found[title])
        assert list(tooltips) == [line["step"] for line in written]
        values = [line[key] for line in written]
        np.testing.assert_allclose([of[title] for of in tooltips.values()], values, rtol=1e-4)
        np.testing.assert_allclose(drawn(found[title])[0][1], values, atol=0.02)
    assert set(hovered(found["milliseconds per step"])[10].values()) == {8, 2}
    assert "gradient norm, logarithmic" in found, "it spans two decades"
    cards = [text(card) for card in page.iter("div") if card.get("class") == "card"]
    last = written[-1]
    assert "steps390of 500" in cards
    assert any(card.startswith(f"loss{last['loss']:.4f}") for card in cards)
    median = np.median([line["tokens_per_sec"] for line in written])
    assert f"tokens/s{median:,.0f}median" in cards
    assert "waiting for input25.0%of a step, median" in cards
    assert "MFU25.0%of the devices' peak, median" in cards
    assert "Tables that grow" not in text(page)
    assert "Some users" not in text(page)
    assert "There was no evaluation during training" in text(page)


def test_long_runs_make_small_pages(tmp_path):
    written = [training_line(i) for i in range(20_000)]
    written[12_345]["loss"] = 1e4
    page = page_of(fake_run(tmp_path / "run", written=written), "--users", "0")
    assert (tmp_path / "run" / "report.html").stat().st_size < 2e6
    assert 12_345 in hovered(figures(page)["loss"])


def test_nothing_written_yet(tmp_path):
    run_dir = fake_run(tmp_path / "run")
    (run_dir / "metrics.jsonl").unlink()
    assert "no line of training yet" in text(page_of(run_dir))


def test_numbers_and_lines_that_are_broken(tmp_path):
    written = [
        training_line(1, loss=math.nan, grad_norm=math.inf),
        training_line(2),
        {"step": "<b>", "loss": 1.0},
        {"step": 3, "loss": "<script>"},
        {"step": 4, "loss": None, "eval/mrr": True},
    ]
    run_dir = fake_run(tmp_path / "run", written=written)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    page = page_of(run_dir, "--users", "0")
    assert list(hovered(figures(page)["loss"])) == [2]
    (run_dir / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        report.main([str(run_dir)])


def test_tables_that_grow(tmp_path):
    def grown(step, name, dropped):
        values = {"rows": 100 * step, "capacity": 512 * 2**step, "dropped": dropped, "evicted": 0}
        return {f"table/{name}/{key}": value for key, value in values.items()}

    features = tuple(dataclasses.replace(f, hash_bucket_size=0) for f in small.config().features)
    config = dataclasses.replace(small.config(), features=features)
    written = [
        training_line(i, **grown(i, "item_id", 7 * i), **grown(i, "behavior_id", 0))
        for i in (1, 2, 3)
    ]
    page = page_of(fake_run(tmp_path / "run", config, written), "--users", "0")
    rows = hovered(figures(page)["rows of item_id"])
    assert rows == {i: {"rows": 100 * i, "capacity": 512 * 2**i} for i in (1, 2, 3)}
    lost = hovered(figures(page)["ids that item_id has lost since the run began"])
    assert lost[3] == {"dropped": 21, "evicted": 0}
    assert "behavior_id has not dropped or evicted any ids" in text(page)
    assert not any("ids that behavior_id" in title for title in figures(page))


def test_users_are_missing_with_a_reason(tmp_path, capsys):
    config = small.config()
    for paths, reason in (
        (str(tmp_path / "gone"), "gone does not exist."),
        ("gone", "gone does not exist; relative paths start from"),
    ):
        moved = dataclasses.replace(config, io=dataclasses.replace(config.io, data_paths=paths))
        page = page_of(fake_run(tmp_path / "run", moved, [training_line(1)]))
        assert "No users are shown: io.data_paths: " in text(page)
        assert reason in text(page)
        assert "no users are shown" in capsys.readouterr().err
        assert "loss" in figures(page)
    small.write_log(tmp_path / "log", 4)
    there = dataclasses.replace(
        config, io=dataclasses.replace(config.io, data_paths=str(tmp_path / "log"))
    )
    page = page_of(fake_run(tmp_path / "run", there))
    assert "found no checkpoints in" in text(page)


def test_mistakes_are_explained(tmp_path, monkeypatch, capsys):
    run_dir = fake_run(tmp_path / "run")
    for arguments, words in (
        ([str(tmp_path)], ["config.json", "expected the directory of a run"]),
        ([str(run_dir), "--users", "-1"], ["--users", "at least 0"]),
        ([str(run_dir), "--users", "few"], ["--users", "few"]),
        ([str(run_dir), "--titles", str(tmp_path / "none.csv")], ["--titles", "none.csv"]),
        ([str(run_dir), "--output", str(tmp_path)], ["--output", "is a directory"]),
        (
            [str(run_dir), "--output", str(tmp_path / "no" / "r.html")],
            ["--output", "a directory that"],
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(report.main)
        assert ended.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: ")
        for word in words:
            assert word in message


def test_configuration(tmp_path):
    config = small.config()
    changed = dataclasses.replace(config, io=dataclasses.replace(config.io, seed=7))
    page = page_of(fake_run(tmp_path / "run", changed), "--users", "0")
    (details,) = page.iter("details")
    rows = {text(row[0]): row for row in details.iter("tr")}
    assert text(rows["io.seed"][1]) == "7"
    assert text(rows["features.2.shard_name"][1]) == "item_id"
    assert text(rows["loss.target_features"][1]) == "('item_id', 'tags')"
    assert rows["io.seed"].find("td/b") is not None
    assert rows["io.shards"].find("td/b") is None
    assert rows["features.0.combiner"].find("td/b") is None
    assert rows["features.0.emb_dim"].find("td/b") is not None


# ------------------------------------------------------------------------------------ escaping


def test_hostile_text_stays_text(tmp_path):
    features = tuple(
        dataclasses.replace(f, shard_name=HOSTILE, hash_bucket_size=0, emb_dim=8)
        for f in small.config().features
    )
    config = dataclasses.replace(small.config(), features=features)
    lost = {f"table/{HOSTILE}/{key}": 3 for key in ("rows", "capacity", "dropped", "evicted")}
    run_dir = fake_run(tmp_path / "<b>&'run", config, [training_line(1, **lost)])
    values = {"eval/users": 3, f"eval/{HOSTILE}": 0.5}
    values |= {f"eval/{HOSTILE}/{name}": 1 for name in ("users", "hr@10", "ndcg@10")}
    saved = {"step": 1, "split": HOSTILE, "metrics": values}
    saved["intervals_95"] = {f"eval/{HOSTILE}": [0, 1]}
    (run_dir / "evaluation_<b>.json").write_text(json.dumps(saved))
    (run_dir / "evaluation_<i>.json").write_text("{}")
    saved = json.loads((run_dir / "config.json").read_text())
    assert saved["features"][0]["shard_name"] == HOSTILE
    record = read_record(run_dir, config.eval)
    best = [Recommended(HOSTILE, 0.5, True), Recommended("known", -0.25, False)]
    user = ShownUser(HOSTILE, 3, 1, [Event(HOSTILE, ""), Event(None, "test")], best, 1, False)
    back = user._replace(rank=None, returns=True)
    page = make_page(config, record, Shown(1, 2, 5, [user, back]), {"known": HOSTILE})
    assert "is already in the user's history" in page
    assert "alert" in page
    assert "<script" not in page
    tree = checked(page)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert [text(b) for b in tree.iter("bdi")].count(shown) >= 5
    assert "no item" in text(tree)
    assert "evaluation_<i>.json (cannot be read)" in text(tree)
    assert len(figures(tree)) >= 6
    hostile = checked(make_page(config, record, HOSTILE, {}))
    assert f"No users are shown: {shown}." in text(hostile)


@pytest.mark.parametrize("code", [*range(0x100), 0x2028, 0xD800, 0xDFFF, 0xFFFE, 0xFFFF, 0x1F600])
def test_every_character_can_be_on_a_page(code):
    element = ET.fromstring(f'<p title="{escaped(chr(code))}">{escaped(chr(code))}</p>'.encode())
    assert len(element.text) == 1


def test_ids_of_any_type_become_text():
    times = pa.array([2**62], pa.timestamp("us"))
    for items, expected in (
        (pa.array([-5]), "-5"),
        (pa.array(["5"], pa.large_string()), "5"),
        (pa.array([b"a\xff"], pa.large_binary()), "a\\xff"),
        (times, times.to_string(skip_new_lines=True)[1:-1]),
    ):
        assert item_text(items, 0) == expected


# -------------------------------------------------------------------------------------- titles


def test_titles(tmp_path):
    path = tmp_path / "titles.csv"
    path.write_text('movieId,title,genres\n1,"Toy, Story",x\n\n02,Ж\n1,again\n', "utf-8")
    expected = {"movieId": "title", "1": "Toy, Story", "02": "Ж"}
    assert read_titles(path) == expected
    path = tmp_path / "titles.tsv"
    path.write_text("\ufeffa\tb,c\n", "utf-8")
    assert read_titles(path) == {"a": "b,c"}
    path = tmp_path / "movies.dat"
    path.write_bytes("1::Misérables, Les (1995)::Drama\n2::A::B\n".encode("latin-1"))
    assert read_titles(path) == {"1": "Misérables, Les (1995)", "2": "A"}
    path.write_bytes("1::Misérables, Les (1995)::Drama\n".encode())
    assert read_titles(path) == {"1": "Misérables, Les (1995)"}
    path = tmp_path / "titles.parquet"
    pq.write_table(pa.table({"i": [5, None, 7], "t": ["five", "none", None]}), path)
    assert read_titles(path) == {"5": "five"}


def test_titles_that_cannot_be_read(tmp_path):
    one = tmp_path / "one.csv"
    one.write_text("1,a\n<2>\n")
    with pytest.raises(UserError, match=r"one\.csv: line 2: expected an item's id"):
        read_titles(one)
    one.write_bytes(b"\xff\xfe1")
    with pytest.raises(UserError, match=r"one\.csv cannot be read"):
        read_titles(one)
    no_parquet = tmp_path / "one.parquet"
    no_parquet.write_text("none")
    with pytest.raises(UserError, match=r"one\.parquet cannot be read"):
        read_titles(no_parquet)
    pq.write_table(pa.table({"i": [5]}), no_parquet)
    with pytest.raises(UserError, match="found 1 columns"):
        read_titles(no_parquet)


# ----------------------------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log") / "log"
    small.write_log(directory, 40)
    return directory


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    """A run with a growing table, evaluated during and after training."""
    config = evaluating(log, tmp_path_factory.mktemp("run"), grows=True, every_steps=10)
    # Large enough not to grow, which would need compilations.
    config = small.with_table(config, "item_id", capacity=1024)
    short = dataclasses.replace(config.train, train_steps=20)
    model = dataclasses.replace(config.model, num_layers=1)
    config = dataclasses.replace(config, train=short, model=model)
    assert not train(config, one_device())
    return config


def test_a_run_from_end_to_end(trained, log, tmp_path, capsys):
    run_dir = Path(trained.train.output_dir)
    titles = tmp_path / "titles.csv"
    titles.write_text("".join(f"{i},Title of {i}\n" for i in range(300)))
    mesh = one_device()
    run = restore(trained, mesh)
    evaluator = Evaluator(EvaluationSettings.of(trained), mesh)
    evaluation = evaluator.evaluate(run.functions, run.state, "test")
    saved = {"step": run.step, "split": "test", "metrics": evaluation.metrics}
    saved["intervals_95"] = evaluation.intervals()
    (run_dir / "evaluation_test_20.json").write_text(json.dumps(saved))
    out = tmp_path / "page.html"
    arguments = [str(run_dir), "--users", "3", "--titles", str(titles), "--out", str(out)]
    assert report.main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    page = checked(out.read_text())
    assert "http://" not in out.read_text()
    assert "https://" not in out.read_text()
    evaluated = [line for line in lines(run_dir) if "eval/mrr" in line]
    curve = hovered(figures(page)["validation mrr"])
    for line in evaluated:
        of = curve[line["step"]]
        assert of["model"] == pytest.approx(line["eval/mrr"], rel=1e-4)
        assert of["by popularity"] == pytest.approx(line["eval/popularity/mrr"], rel=1e-4)
        assert of["by neighbours"] == pytest.approx(line["eval/neighbours/mrr"], rel=1e-4)
    best = max(line["eval/ndcg@10"] for line in evaluated)
    assert f"best ndcg@10{best:.4f}step {run.step}" in text(page)
    rows = {text(row[0]): [text(cell) for cell in row] for row in page.iter("tr")}
    low, high = evaluation.intervals()["eval/hr@10"]
    value = evaluation.metrics["eval/hr@10"]
    assert rows["hr@10"][1:3] == [f"{value:.4f}", f"{low:.4f} to {high:.4f}"]
    users = [div for div in page.iter("div") if div.get("class") == "user"]
    assert len(users) == 3
    assert "Title of " in text(users[0])
    assert "table/item_id/rows" in lines(run_dir)[0]
    assert "rows of item_id" in figures(page)


def test_evaluations_of_weights_that_are_no_longer_there_are_not_shown(tmp_path):
    """A new training in the same directory has checkpoints of the same steps."""
    times = tmp_path / "checkpoints" / "20" / "_CHECKPOINT_METADATA"
    times.parent.mkdir(parents=True)
    times.write_text("1")
    saved = {"step": 20, "split": "test", "metrics": {"eval/mrr": 0.5}, "intervals_95": {}}
    known = saved | {"checkpoint": checkpoint_fingerprint(tmp_path, 20)}
    path = tmp_path / "evaluation_test_20.json"
    path.write_text(json.dumps(known))
    assert [found.name for found in read_record(tmp_path, EvalConfig()).saved] == [path.name]
    times.write_text("2")
    record = read_record(tmp_path, EvalConfig())
    assert record.saved == []
    assert record.others == ["evaluation_test_20.json (of weights that are no longer there)"]
    # Older files do not name the checkpoint, and checkpoints may be gone.
    path.write_text(json.dumps(saved))
    assert len(read_record(tmp_path, EvalConfig()).saved) == 1
    path.write_text(json.dumps(known))
    shutil.rmtree(times.parent)
    assert len(read_record(tmp_path, EvalConfig()).saved) == 1


def test_the_page_says_how_an_evaluation_ranked(tmp_path):
    how = {"filter_seen": True, "untrained": "keep", "neighbours": 0.5, "known_of_target": ["hour"]}
    saved = {"step": 20, "split": "test", "metrics": {"eval/mrr": 0.5}, "intervals_95": {}}
    (tmp_path / "evaluation_test_20.json").write_text(json.dumps(saved | how))
    settings = EvalConfig(filter_seen=False, neighbours="auto")
    (found,) = read_record(tmp_path, settings).saved
    assert found.conditions == (
        "eval.filter_seen True (the configuration of the run has False)",
        "eval.untrained keep",
        "eval.neighbours 0.5",
        "time-aware (hour of the target known)",
    )
    (found,) = read_record(tmp_path, EvalConfig(neighbours=2)).saved
    assert "eval.filter_seen True" in found.conditions
    assert "eval.neighbours 0.5 (the configuration of the run has 2)" in found.conditions
    blind = {"known_of_target": [], "true_time": True}
    (tmp_path / "evaluation_test_20.json").write_text(json.dumps(saved | blind))
    (found,) = read_record(tmp_path, settings).saved
    assert found.conditions == ("time-blind", "true time of the history")


@pytest.mark.slow
def test_users_are_ranked_as_in_an_evaluation(trained, log):
    run_dir = Path(trained.train.output_dir)
    mesh = make_mesh()
    shown = show_users(trained, run_dir, 6)
    assert len(shown.users) == 6
    assert {user.file for user in shown.users} == {"part-0.orc", "part-1.orc"}
    run = restore(trained, mesh)
    assert shown.step == run.step
    rows = {path.name: orc.read_table(str(path)).to_pylist() for path in log.glob("*.orc")}
    chosen = [rows[user.file][user.row] for user in shown.users]
    before = [cut(row, len(row["item_id"]) - 1) for row in chosen]
    vectors = user_vector(trained, run, before, mesh)
    catalogue = of_config.collect(trained)
    items = catalogue.item.to_pylist()
    item_vectors_IE = item_vectors(run.functions, run.state, catalogue, Items.of(trained), mesh)
    for user, row, vector in zip(shown.users, chosen, vectors, strict=True):
        history = [i for (i,) in row["item_id"]]
        assert user.events == len(history)
        assert [event.item for event in user.last] == [str(i) for i in history[-10:]]
        kept_for = [event.held_out for event in user.last]
        assert kept_for[-2:] == ["validation", "test"][-len(kept_for) :]
        assert not any(kept_for[:-2])
        target = history[-1]
        scores = dict(zip(items, (item_vectors_IE @ vector).tolist(), strict=True))
        left = {i: s for i, s in scores.items() if i == target or i not in history}
        found = [int(one.item) for one in user.best]
        np.testing.assert_allclose(
            [one.score for one in user.best],
            sorted(left.values())[: -len(found) - 1 : -1],
            atol=1e-5,
        )
        np.testing.assert_allclose(
            [left[i] for i in found], [one.score for one in user.best], atol=1e-5
        )
        assert [one.is_next for one in user.best] == [i == target for i in found]
        better = sum(s >= scores[target] - 1e-6 for i, s in left.items() if i != target)
        assert user.rank is not None
        assert abs(user.rank - 1 - better) <= 1
        if target in found:
            # Ties are listed in a fixed order, but count against the target in its rank.
            ties = sum(one.score == user.best[found.index(target)].score for one in user.best)
            assert 0 <= user.rank - (found.index(target) + 1) < ties or user.rank >= 10


def test_a_moved_run_whose_checkpoints_are_gone(trained, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(trained.train.output_dir, moved)
    page = page_of(moved, "--users", "1")
    assert "Recommendations of the checkpoint" in text(page)
    shutil.rmtree(moved / "checkpoints")
    page = page_of(moved, "--users", "1")
    assert f"found no checkpoints in {moved}" in text(page)
    assert {"loss", "validation mrr", "rows of item_id"} <= set(figures(page))


def test_whole_histories_where_nothing_is_held_out(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained.train.output_dir, run_dir)
    config = dataclasses.replace(trained, eval=dataclasses.replace(trained.eval, split=None))
    saved = json.loads((run_dir / "config.json").read_text())
    saved["eval"]["split"] = None
    (run_dir / "config.json").write_text(json.dumps(saved))
    shown = show_users(config, run_dir, 7)
    assert len(shown.users) == 7
    for user in shown.users:
        assert user.rank is None
        assert not any(event.held_out for event in user.last)
        assert not any(one.is_next for one in user.best)
        assert not {e.item for e in user.last} & {one.item for one in user.best}
