"""Evaluation (also during training) and recommendation, compared with NumPy over the log's rows."""

import collections
import contextlib
import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import of_config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from evaluations import config_file, cut, evaluating, rows_of, user_vector
from jobs_of import job, lines, one_device
from pyarrow import orc

from s2s_jax.cli.commands import evaluate, recommend
from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Pack, Truncate
from s2s_jax.config.settings import Items, Sequences
from s2s_jax.data.batching.dataset import HostSlice
from s2s_jax.data.logs.orc import read_stripe
from s2s_jax.errors import UserError
from s2s_jax.jobs.stripe_recommender import StripeRecommender
from s2s_jax.jobs.train import train
from s2s_jax.ranking.encode import item_vectors
from s2s_jax.ranking.evaluation import EvaluationSettings, Evaluator
from s2s_jax.ranking.restored import restore
from s2s_jax.ranking.tally import below_neighbours
from s2s_jax.training.step.batches import put_batch
from s2s_jax.training.step.functions import make_step_functions
from s2s_jax.training.step.settings import StepSettings
from s2s_serve.encoding import blocks, features

USERS = 90


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log") / "log"
    small.write_log(directory, USERS)
    return directory


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    """Runs with a growing table and with a bucket table."""
    config = evaluating(log, tmp_path_factory.mktemp("run"), grows=True, every_steps=10)
    assert not train(config, one_device())
    return config


@pytest.mark.parametrize("split", ["test", pytest.param("validation", marks=pytest.mark.slow)])
def test_against_numpy(trained, log, split):
    mesh = make_mesh(jax.devices()[:2])
    run = restore(trained, mesh, "newest")
    evaluator = Evaluator(EvaluationSettings.of(trained), mesh)
    found = evaluator.evaluate(run.functions, run.state, split)
    ahead = 0 if split == "test" else 1
    rows = [row for row in rows_of(log) if len(row["item_id"]) >= 2 + ahead]
    before = [cut(row, len(row["item_id"]) - 1 - ahead) for row in rows]
    users = user_vector(trained, run, before, mesh)
    items = evaluator.catalogue.item.to_pylist()
    assert set(items) == {i for row in rows_of(log) for (i,) in row["item_id"]}
    vectors = item_vectors(run.functions, run.state, evaluator.catalogue, Items.of(trained), mesh)
    ranks = []
    for row, history, user in zip(rows, before, users, strict=True):
        target = row["item_id"][len(history["item_id"])][0]
        scores = dict(zip(items, (vectors @ user).tolist(), strict=True))
        seen = {i for (i,) in history["item_id"]}
        better = [i for i in items if i not in seen and scores[i] >= scores[target] - 1e-7]
        ranks.append(len(better) - 1)
    ranks = np.array(ranks)
    assert found.metrics["eval/users"] == len(ranks)
    for k in (5, 10, 50):
        # Scores that only differ by rounding may change places.
        near = {"atol": 2.5 / len(ranks)}
        np.testing.assert_allclose(found.metrics[f"eval/hr@{k}"], (ranks < k).mean(), **near)
        gain = np.where(ranks < k, 1 / np.log2(ranks + 2), 0).mean()
        np.testing.assert_allclose(found.metrics[f"eval/ndcg@{k}"], gain, **near)
    np.testing.assert_allclose(found.metrics["eval/mrr"], (1 / (ranks + 1)).mean(), atol=0.02)
    low, high = found.intervals()["eval/hr@10"]
    assert low <= found.metrics["eval/hr@10"] <= high


def test_popularity_counts_only_what_training_sees(trained, log):
    evaluator = Evaluator(EvaluationSettings.of(trained), one_device())
    counts = {}
    for row in rows_of(log):
        for (item,) in row["item_id"][:-2]:
            counts[item] = counts.get(item, 0) + 1
    items = evaluator.catalogue.item.to_pylist()
    assert evaluator._count_I.tolist() == [counts.get(item, 0) for item in items]


def neighbours_by_hand(histories):
    """A function from a history to the scores of items, and the counts of items, in training."""
    weights, counts = collections.Counter(), collections.Counter()
    for history in histories:
        seen_by_training = history[:-2]
        counts.update(seen_by_training)
        for distance in (1, 2, 3):
            for pair in zip(seen_by_training, seen_by_training[distance:], strict=False):
                weights[pair] += Fraction(1, distance)
    follows = collections.defaultdict(list)
    for (first, second), weight in weights.items():
        follows[first].append((second, weight))

    def scores_after(before):
        scores = collections.Counter()
        for number, item in enumerate(before[::-1][:5], 1):
            for second, weight in follows[item]:
                scores[second] += weight / number
        return scores

    return scores_after, counts


@pytest.mark.parametrize("part", ["validation", "test"])
def test_neighbours_against_a_count_by_hand(trained, log, part):
    mesh = one_device()
    run = restore(trained, mesh, "newest")
    evaluator = Evaluator(EvaluationSettings.of(trained), mesh)
    found = evaluator.evaluate(run.functions, run.state, part).metrics
    items = evaluator.catalogue.item.to_pylist()
    histories = [[item for (item,) in row["item_id"]] for row in rows_of(log)]
    scores_after, counts = neighbours_by_hand(histories)
    held_out = 2 if part == "validation" else 1
    ranks = []
    for history in histories:
        if len(history) <= held_out:
            continue
        before, target = history[:-held_out], history[-held_out]
        if target in before:
            ranks.append(10**6)
            continue
        scores = scores_after(before)
        key = (scores[target], counts[target])
        ranks.append(
            sum((scores[i], counts[i]) >= key for i in items if i not in before and i != target)
        )
    ranks = np.array(ranks)
    assert found["eval/neighbours/users"] == found["eval/users"] == len(ranks)
    assert found["eval/neighbours/hr@10"] == pytest.approx((ranks < 10).mean())
    gain = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    assert found["eval/neighbours/ndcg@10"] == pytest.approx(gain)
    mrr = np.where(ranks < len(items), 1 / (ranks + 1), 0).mean()
    assert found["eval/neighbours/mrr"] == pytest.approx(mrr)
    assert found["eval/neighbours/ndcg@10"] > 2 * found["eval/popularity/ndcg@10"]


def test_neighbours_add_to_the_scores_of_the_model(trained, log):
    config = dataclasses.replace(trained, eval=dataclasses.replace(trained.eval, neighbours=0.7))
    mesh = make_mesh(jax.devices()[:2])
    run = restore(config, mesh, "newest")
    evaluator = Evaluator(EvaluationSettings.of(config), mesh)
    found = evaluator.evaluate(run.functions, run.state, "test").metrics
    alone = Evaluator(EvaluationSettings.of(trained), mesh)
    assert (
        found["eval/ndcg@10"]
        > alone.evaluate(run.functions, run.state, "test").metrics["eval/ndcg@10"]
    )
    rows = [row for row in rows_of(log) if len(row["item_id"]) >= 2]
    scores_after, _ = neighbours_by_hand(
        [[item for (item,) in row["item_id"]] for row in rows_of(log)]
    )
    items = evaluator.catalogue.item.to_pylist()
    vectors = item_vectors(run.functions, run.state, evaluator.catalogue, Items.of(config), mesh)
    ranks = []
    for row in rows:
        before, (target,) = [i for (i,) in row["item_id"][:-1]], row["item_id"][-1]
        user = user_vector(config, run, [cut(row, len(before))], mesh)[0]
        counted = scores_after(before)
        # Logits: scores divided by the temperature.
        bias = [0.7 * np.log1p(float(counted[i]) / 0.05) for i in items]
        logits = vectors @ user / config.loss.temperature + bias
        logits[np.isin(items, before)] = -np.inf
        own = logits[items.index(target)]
        ranks.append(10**6 if target in before else (logits >= own - 1e-5).sum() - 1)
    ranks = np.array(ranks)
    near = {"abs": 1.5 / len(ranks)}
    assert found["eval/hr@10"] == pytest.approx((ranks < 10).mean(), **near)
    gain = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    assert found["eval/ndcg@10"] == pytest.approx(gain, **near)


def test_a_model_below_neighbours_is_reported():
    better = {"eval/ndcg@10": 0.2, "eval/neighbours/ndcg@10": 0.2}
    assert below_neighbours(better, "ndcg@10", added=False) is None
    # Evaluations of older versions have no neighbours.
    assert below_neighbours({"eval/ndcg@10": 0.2}, "ndcg@10", added=False) is None
    told = below_neighbours(
        {"eval/ndcg@10": 0.1, "eval/neighbours/ndcg@10": 0.2}, "ndcg@10", added=False
    )
    assert "ndcg@10" in told
    assert "0.1000" in told
    assert "0.2000" in told
    # Who adds neighbours already is not advised to do so.
    assert "eval.neighbours adds" in told
    worse = {"eval/ndcg@10": 0.1, "eval/neighbours/ndcg@10": 0.2}
    assert "although eval.neighbours adds" in below_neighbours(worse, "ndcg@10", added=True)


def test_results_do_not_depend_on_devices_or_batches(trained):
    results = []
    for devices, batch_size in ((1, 32), (4, 16)):
        config = dataclasses.replace(
            trained, eval=dataclasses.replace(trained.eval, batch_size=batch_size)
        )
        mesh = make_mesh(jax.devices()[:devices])
        run = restore(config, mesh, "newest")
        found = Evaluator(EvaluationSettings.of(config), mesh).evaluate(
            run.functions, run.state, "test"
        )
        results.append(found.metrics)
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1.5 / USERS)


def test_training_never_sees_what_is_held_out(log):
    config = evaluating(log, Path("unused"))
    index = of_config.index(config)
    file, number, first_row = index.stripes[0]
    batch = read_stripe(file, number, features.column_names(config.features))
    block = of_config.decode(batch, file, first_row, config)
    ids = blocks.to_dense([blocks.pack(block)], batch.num_rows, config.model.seq_len)["ids"]
    for row, found in zip(batch.to_pylist(), ids, strict=True):
        kept = [i for (i,) in row["item_id"][:-2]][-config.model.seq_len :]
        assert found[: len(kept), 0].tolist() == kept
        assert (found[len(kept) :] == -1).all()


def test_only_what_tells_of_the_next_event_knows_the_target(log):
    config = evaluating(log, Path("unused"))
    behavior = config.feature("behavior_id")
    asked = dataclasses.replace(behavior, name="asked", column="behavior_id", of_next=True)
    config = dataclasses.replace(config, features=(*config.features, asked))
    numbers = of_config.numbers(of_config.collect(config), config)
    reader = of_config.history_reader(config, of_config.index(config), numbers, USERS)
    place = features.id_columns(config.features)
    for split, left_out in (("test", 1), ("validation", 2), (None, 0)):
        targets = None if split is None else of_config.targets(config, split)
        batches = [b for stripe in range(reader.stripes) for b in reader.read(stripe, targets)]
        found = [b.shown_of(n) for b in batches for n in range(b.users)]
        rows = [row for row in rows_of(log) if len(row["item_id"]) > left_out]
        for row, ids in zip(rows, found, strict=True):
            end = len(row["item_id"]) - left_out
            first = max(end - config.model.seq_len, 0)
            own = [b for (b,) in row["behavior_id"]]
            assert ids[:, place["behavior_id"]].ravel().tolist() == own[first:end]
            # The last event of a row has none.
            following = [*own, -1][first + 1 : end + 1]
            assert ids[:, place["asked"]].ravel().tolist() == following


@pytest.mark.parametrize(
    "sequences",
    [pytest.param(Truncate(), marks=pytest.mark.slow), Pack(rows=8)],
    ids=lambda made: made.kind,
)
def test_every_learned_position_that_is_shown_was_trained(log, sequences):
    config = evaluating(log, Path("unused"))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, position="learned", num_layers=1),
        io=dataclasses.replace(config.io, sequences=sequences),
        lr=dataclasses.replace(config.lr, weight_decay=0.0),
    )
    mesh = make_mesh(jax.devices()[:1])
    functions = make_step_functions(StepSettings.of(config), mesh)
    state = functions.init()
    before = np.array(state.params["dense"]["transformer"]["positions"])
    rows = Sequences.of(config).device_rows
    with contextlib.closing(of_config.reader(config, rows, HostSlice(0, 1))) as reader:
        for _ in range(3):
            state, _ = functions.train_step(state, put_batch(next(reader).arrays, 1, mesh))
    after = np.array(state.params["dense"]["transformer"]["positions"])
    (trained,) = np.nonzero((before != after).any(axis=1))
    numbers = of_config.numbers(of_config.collect(config), config)
    histories = of_config.history_reader(config, of_config.index(config), numbers, USERS)
    lengths = [b.shown_U for n in range(histories.stripes) for b in histories.read(n, None)]
    assert np.concatenate(lengths).max() == len(trained) == config.model.seq_len - 1


def test_histories_end_before_the_target(log):
    config = evaluating(log, Path("unused"))
    catalogue = of_config.collect(config)
    numbers = of_config.numbers(catalogue, config)
    items = catalogue.item.to_pylist()
    rows = rows_of(log)
    for split, left_out in (("test", 1), ("validation", 2), (None, 0)):
        targets = None if split is None else of_config.targets(config, split)
        reader = of_config.history_reader(config, of_config.index(config), numbers, 32)
        found = [b for stripe in range(reader.stripes) for b in reader.read(stripe, targets)]
        expected = [r for r in rows if len(r["item_id"]) > left_out]
        assert sum(b.users for b in found) == len(expected)
        number = 0
        for batch in found:
            for n in range(batch.users):
                row = [i for (i,) in expected[number]["item_id"]]
                history = row[: len(row) - left_out]
                newest = history[-config.model.seq_len :]
                assert batch.shown_of(n)[:, 0].tolist() == newest
                assert batch.shown_U[n] == len(newest)
                assert [items[i] for i in batch.items_of(n)] == history
                assert batch.known_events()[n] == len(history)
                seen = batch.seen.item_T[batch.seen.user_T == n]
                assert [items[i] for i in seen] == sorted(set(history), key=items.index)
                assert batch.events_U[n] == len(history)
                target = -1 if split is None else items.index(row[len(history)])
                assert batch.target_U[n] == target
                number += 1
            assert (batch.target_U[batch.users :] == -1).all()
            assert (batch.shown_U[batch.users :] == 0).all()


def test_lines_of_evaluations_and_the_best_checkpoint(trained):
    run_dir = Path(trained.train.output_dir)
    written = [line for line in lines(run_dir) if "eval/ndcg@10" in line]
    assert [line["step"] for line in written] == [10, 20, 30, 40]
    best = max(written, key=lambda line: line["eval/ndcg@10"])
    assert restore(trained, one_device()).step == best["step"]
    assert restore(trained, one_device(), "20").step == 20
    with pytest.raises(UserError, match="--checkpoint: expected best, newest or one of 10, 20"):
        restore(trained, one_device(), "7")


def test_every_steps_auto_evaluates_after_each_tenth(log, tmp_path):
    config = evaluating(log, tmp_path, every_steps="auto")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=29))
    assert not train(config, one_device())
    # Every 3 steps, and at the end: ten times.
    written = [line["step"] for line in lines(tmp_path) if "eval/mrr" in line]
    assert written == [*range(3, 29, 3), 29]


def test_the_best_is_kept_and_patience_ends_a_run(log, tmp_path, capsys):
    config = evaluating(log, tmp_path, every_steps=1, patience=3)
    train_config = dataclasses.replace(config.train, max_to_keep=1, log_steps=1)
    config = dataclasses.replace(config, train=train_config)
    # A learning rate that makes the model worse with every step.
    config = dataclasses.replace(config, lr=dataclasses.replace(config.lr, dense_lr=1.0))
    assert not train(config, one_device())
    written = [line for line in lines(tmp_path) if "eval/ndcg@10" in line]
    values = [line["eval/ndcg@10"] for line in written]
    best = written[int(np.argmax(values))]["step"]
    assert len(written) == best + 3 < 40
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, best + 3}
    told = capsys.readouterr().err
    assert "3 evaluations in a row" in told
    # Each evaluation is printed beside the rankings without a model, and a run below them says so.
    line = written[-1]
    popularity, neighbours = (line[f"eval/{name}/ndcg@10"] for name in ("popularity", "neighbours"))
    pair = f"(popularity {popularity:.4f}, neighbours {neighbours:.4f})"
    assert told.count(pair) == len(written)
    assert neighbours > max(values)
    assert "below" in told.splitlines()[-1]


@pytest.mark.slow
def test_an_interrupted_run_evaluates_the_same(trained, log, tmp_path):
    config = dataclasses.replace(
        trained, train=dataclasses.replace(trained.train, output_dir=str(tmp_path))
    )
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=25))
    assert not train(short, one_device())
    assert not train(config, one_device())

    def evaluated(run_dir):
        return [line for line in lines(run_dir) if "eval/mrr" in line]

    found, whole = evaluated(tmp_path), evaluated(Path(trained.train.output_dir))
    # A run also evaluates its last step, whatever its number.
    assert [line["step"] for line in found] == [10, 20, 25, 30, 40]
    assert [line for line in found if line["step"] != 25] == whole


def test_the_evaluate_command(trained, tmp_path, capsys, caplog):
    out = tmp_path / "result.json"
    arguments = ["--config", config_file(trained, tmp_path), "--out", str(out)]
    assert evaluate.main([*arguments, "--checkpoint", "40"]) == 0
    assert [record.getMessage() for record in caplog.records] == []
    output = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["step"] == 40
    assert result["split"] == "test"
    assert f"{result['metrics']['eval/hr@10']:.4f}" in output
    assert "popularity" in output
    assert "time-blind" in output
    assert result["known_of_target"] == []


@pytest.mark.slow
def test_features_of_the_next_event_are_used_and_reported(tmp_path, capsys):
    """Behaviour b has the b-th ten items: knowing the next behaviour leaves a tenth of the items."""
    rng = np.random.default_rng(0)
    behavior = [rng.integers(0, 10, 12).tolist() for _ in range(300)]
    item = [[10 * b + int(rng.integers(10)) for b in row] for row in behavior]
    columns = {"item_id": item, "behavior_id": behavior, "tags": item}
    table = pa.table({name: [[[x] for x in row] for row in rows] for name, rows in columns.items()})
    (tmp_path / "log").mkdir()
    orc.write_table(table, str(tmp_path / "log" / "part-0.orc"))
    hits = {}
    for known in (False, True):
        config = evaluating(tmp_path / "log", tmp_path / str(known), every_steps=600)
        changed = tuple(
            dataclasses.replace(f, of_next=known, hash_bucket_size=10)
            if f.name == "behavior_id"
            else f
            for f in config.features
        )
        train_config = dataclasses.replace(config.train, train_steps=600)
        config = dataclasses.replace(config, features=changed, train=train_config)
        assert not train(config, one_device())
        capsys.readouterr()
        arguments = ["--config", config_file(config, tmp_path / str(known))]
        assert evaluate.main(arguments) == 0
        output = capsys.readouterr().out
        assert ("behavior_id of the target known" in output) == known
        (result,) = (tmp_path / str(known)).glob("evaluation_test_*.json")
        result = json.loads(result.read_text())
        assert result["known_of_target"] == (["behavior_id"] if known else [])
        hits[known] = result["metrics"]["eval/hr@10"]
    # By chance, a tenth, or all.
    assert hits[False] < 0.3
    assert hits[True] > 0.8
    recs = ["--input", str(tmp_path / "log"), "--output", str(tmp_path / "recs.parquet")]
    assert recommend.main([*arguments, *recs, "--top_k", "3"]) == 0
    assert "(behavior_id) describe the next event" in capsys.readouterr().err


def test_nothing_held_out_is_refused(log, tmp_path):
    with pytest.raises(UserError, match=r"eval\.split: expected last_events or by_time"):
        Evaluator(EvaluationSettings.of(job(log, tmp_path)), one_device())


def test_the_recommend_command_writes_the_best_items_and_continues(
    trained, log, tmp_path, monkeypatch
):
    out = tmp_path / "recs.parquet"
    arguments = ["--config", config_file(trained, tmp_path), "--input", str(log)]
    arguments += ["--output", str(out), "--top_k", "7", "--checkpoint", "newest"]
    again = []
    whole = StripeRecommender.recommend

    def noting(self, stripes):
        for done in whole(self, stripes):
            again.append(done[0])
            yield done

    def interrupted(self, stripes):
        yield next(whole(self, stripes))
        raise KeyboardInterrupt

    monkeypatch.setattr("s2s_jax.jobs.stripe_recommender.StripeRecommender.recommend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recommend.main(arguments)
    assert not out.exists()
    monkeypatch.setattr("s2s_jax.jobs.stripe_recommender.StripeRecommender.recommend", noting)
    assert recommend.main(arguments) == 0
    assert again == [1], "what was written is not done again"
    assert not out.with_name("recs.parquet.parts").exists()
    table = pq.read_table(out)
    rows = rows_of(log)
    assert table.num_rows == len(rows)
    mesh = make_mesh(jax.devices()[:1])
    run = restore(trained, mesh, "newest")
    catalogue = of_config.collect(trained)
    items = catalogue.item.to_pylist()
    vectors = item_vectors(run.functions, run.state, catalogue, Items.of(trained), mesh)
    users = user_vector(trained, run, rows, mesh)
    for row, user, found, scores in zip(
        rows, users, table["items"].to_pylist(), table["scores"].to_pylist(), strict=True
    ):
        seen = {i for (i,) in row["item_id"]}
        assert len(set(found)) == len(found) == 7
        assert not seen & set(found)
        score_of = dict(zip(items, (vectors @ user).tolist(), strict=True))
        np.testing.assert_allclose([score_of[i] for i in found], scores, atol=1e-5)
        others = [s for i, s in score_of.items() if i not in seen and i not in found]
        assert max(others) <= scores[-1] + 1e-5


@pytest.mark.slow
def test_recommend_does_not_continue_with_other_weights(
    trained, log, tmp_path, monkeypatch, capsys
):
    shutil.copytree(trained.train.output_dir, tmp_path / "run")
    arguments = ["--config", config_file(trained, tmp_path), "--input", str(log)]
    arguments += ["--train.output_dir", str(tmp_path / "run")]
    arguments += ["--output", str(tmp_path / "recs.parquet"), "--checkpoint", "newest"]
    whole, done = StripeRecommender.recommend, []

    def interrupted(self, stripes):
        for found in whole(self, stripes):
            done.append(found[0])
            if found[0] == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr("s2s_jax.jobs.stripe_recommender.StripeRecommender.recommend", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recommend.main(arguments)
    assert done == [0, 1, 1]
    # As if a new training had replaced the run in its directory.
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    metadata = json.loads((newest / "_CHECKPOINT_METADATA").read_text())
    metadata["init_timestamp_nsecs"] += 1
    (newest / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(KeyboardInterrupt):
        recommend.main(arguments)
    assert done == [0, 1, 1, 0, 1]
    assert "made with another checkpoint; starting over" in capsys.readouterr().err
    # Counts are added in units of the temperature.
    done.clear()
    for more in ([], ["--loss.temperature", "0.3"]):
        with pytest.raises(KeyboardInterrupt):
            recommend.main([*arguments, "--eval.neighbours", "1", *more])
    assert done == [0, 1, 0, 1]
    assert "another loss.temperature; starting over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--top_k", "0"], ["--top_k", "at least 1"]),
        (["--user_column", "uid"], ["uid", "item_id"]),
        (["--train.output_dir", "/nowhere"], ["train.output_dir", "/nowhere"]),
    ],
)
def test_mistakes_with_recommend_are_explained(trained, log, tmp_path, changed, words):
    arguments = ["--config", config_file(trained, tmp_path), "--input", str(log)]
    arguments += ["--output", str(tmp_path / "recs.parquet"), *changed]
    with pytest.raises(UserError) as caught:
        recommend.main(arguments)
    for word in words:
        assert word in str(caught.value)
