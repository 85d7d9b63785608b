"""A reader of exports that follows the pages, event by event, gives the answers of the client.

The pages are docs/reference/export_format.md and docs/howto/other_servers.md.
"""

import json
import math
import re
from collections import defaultdict

import farmhash
import numpy as np
import onnxruntime
import pyarrow.parquet
import pytest
import safetensors.numpy
from murmur import reference
from places import REPO

import s2s_serve

PAGE = (REPO / "docs" / "howto" / "other_servers.md").read_text()
HASHES = {"murmur": reference, "farm": farmhash.fingerprint64}
K = 9


class Reader:
    """Answers from the files of a version."""

    def __init__(self, directory):
        (code,) = re.findall(r"^```python\n(MASK = .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        self.page = {}
        exec(code, self.page)
        self.manifest = json.loads((directory / "manifest.json").read_text())
        self.tables = {
            name: [safetensors.numpy.load_file(directory / shard) for shard in table["shards"]]
            for name, table in self.manifest["tables"].items()
        }
        self.items = pyarrow.parquet.read_table(directory / "items.parquet").to_pylist()
        self.number = {each["item"]: n for n, each in enumerate(self.items)}
        self.vectors = safetensors.numpy.load_file(directory / "vectors.safetensors")["vectors"]
        self.counts = safetensors.numpy.load_file(directory / "neighbours.safetensors")
        self.tower = onnxruntime.InferenceSession(directory / "tower.onnx")

    def encode(self, history):
        events = []
        for position in range(len(history["timestamp"])):
            parts = [self.embedded(f, history, position) for f in self.manifest["features"]]
            events.append(np.concatenate(parts))
        shown = np.array(events[-self.manifest["shown_len"] :], np.float32)
        length = np.array([len(shown)], np.int32)
        return self.tower.run(["users"], {"events": shown[None], "length": length})[0][0]

    def embedded(self, feature, history, position):
        """The embedding of one feature of one event."""
        entries = history[feature["column"] or feature["name"]]
        entry = entries[position]
        if feature["op"] == "time_gap":
            gap = entry - entries[position - 1] if position else None
            step = 1 if gap is not None and gap < 1 else gap and 2 + int(math.log2(gap))
            bag = [min(step or 0, feature["hash_bucket_size"] - 1)]
        elif feature["op"] == "hour_of_day":
            bag = [int(entry + 3600 * feature["utc_offset_hours"]) // 3600 % 24]
        else:
            bag = entry if isinstance(entry, list) else [entry]
        rows = [self.row(feature, each) for each in bag if each is not None]
        total = np.sum([np.zeros(feature["emb_dim"]), *rows], axis=0)
        return total / len(rows) if rows and feature["combiner"] == "mean" else total

    def row(self, feature, entry):
        name = feature["shard_name"] or feature["name"]
        table, shards = self.manifest["tables"][name], self.tables[name]
        rows = np.concatenate([shard["rows"] for shard in shards])
        number = entry
        if feature["hash_type"] is not None:
            text = isinstance(entry, str)
            data = entry.encode() if text else entry.to_bytes(8, "little", signed=True)
            number = HASHES[feature["hash_type"]](data)
        if not table["grows"]:
            bucket = number % feature["hash_bucket_size"]
            return rows[self.page["row"](bucket, table["segment_rows"])]
        wide = number % 2**63 if feature["hash_type"] is not None else number % 2**64
        keys = np.concatenate([shard["keys"] for shard in shards]).tolist()
        if self.page["key"](wide) in keys:
            return rows[keys.index(self.page["key"](wide))]
        default = table["default_row"]
        return np.zeros(table["emb_dim"]) if default is None else np.array(default)

    def recommend(self, history, k):
        """The best items and their scores."""
        manifest, begin = self.manifest, self.counts["begin"]
        counted = defaultdict(float)
        for age, item in enumerate(history["item_id"][:-6:-1]):
            if item in self.number:
                mine = slice(begin[self.number[item]], begin[self.number[item] + 1])
                for other, weight in zip(
                    self.counts["item"][mine], self.counts["weight"][mine], strict=True
                ):
                    counted[int(other)] += int(weight) / 6 / (age + 1)
        scores = (self.vectors @ self.encode(history)).astype(np.float64)
        for other, count in counted.items():
            logarithm = math.log(1 + count / 0.05)
            scores[other] += manifest["neighbours"] * manifest["temperature"] * logarithm
        assert manifest["untrained"] == "keep"
        left = [
            n
            for n, each in enumerate(self.items)
            if not (manifest["filter_seen"] and each["item"] in history["item_id"])
        ]
        best = sorted(left, key=lambda n: -scores[n])[:k]
        return [self.items[n]["item"] for n in best], scores[best]


@pytest.fixture(scope="module")
def reader(small_export):
    return Reader(small_export.directory / "versions" / "1")


def test_a_reader_that_follows_the_pages_gives_the_answers_of_the_client(small_export, reader):
    model = s2s_serve.load(small_export.directory)
    rows = [row for row in small_export.rows if row["item_id"]]
    rows.append({"item_id": ["never seen", None], "tags": [[], [77]], "timestamp": [5, 4]})
    answers = model.recommend(rows, K)
    for row, vector, answer in zip(rows, model.encode(rows), answers, strict=True):
        np.testing.assert_allclose(reader.encode(row), vector, atol=1e-5)
        items, scores = reader.recommend(row, K)
        np.testing.assert_allclose(answer.scores, scores, atol=1e-5)
        far = np.append(-np.diff(scores), 1) > 1e-4
        clear = [bool(far[n]) and (n == 0 or bool(far[n - 1])) for n in range(K - 1)]
        assert [a for a, c in zip(answer.items, clear, strict=False) if c] == [
            b for b, c in zip(items, clear, strict=False) if c
        ]
        assert sum(clear) >= K // 3
