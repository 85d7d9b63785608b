"""Many requests while versions change and the server is killed: none wrong, none from two versions."""

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import time

import fake_model
import numpy as np
import pytest
import server_process
from http_caller import Caller

import s2s_serve
from s2s_serve import tensor_file
from s2s_serve.manifest import checksum_of
from s2s_serve.server.loading import load


class Crowd:
    """Callers that check each answer against what the fake model must say.

    Attributes:
      requests: number of requests to make.
      answered: number of answers by status.
      versions: the versions that answered.
      wrong: what was wrong.
      lost: when requests had no answer.
    """

    def __init__(self, port, requests):
        self.port = port
        self.requests = requests
        self.left = requests
        self.answered = {200: 0, 400: 0}
        self.versions = set()
        self.wrong = []
        self.lost = []

    async def call(self, seed):
        draw, caller = random.Random(seed), Caller(self.port)
        while self.left > 0:
            self.left -= 1
            last = [draw.randrange(100, 190) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
            bad = draw.random() < 0.02
            column = "wrong" if bad else "item_id"
            k = draw.choice((1, 3))
            body = {"histories": [{column: [each]} for each in last], "k": k}
            began = time.monotonic()
            try:
                status, answer = await caller.post("/v1/recommend", body)
            except (OSError, asyncio.IncompleteReadError):
                status = None
            # A server that was just started again may still load its version.
            if status in (None, 503):
                self.lost.append((began, time.monotonic()))
                self.left += 1
                await asyncio.sleep(0.05)
                continue
            self.check(status, answer, last, k, bad)
        caller.close()

    def check(self, status, answer, last, k, bad):
        self.answered[status] += 1
        if bad:
            if status != 400:
                self.wrong.append(answer)
            return
        version = answer["version"]
        self.versions.add(version)
        expected = [
            {
                "items": list(range(each + 1, each + 1 + k)),
                "scores": [version + 1 / (2 + n) for n in range(k)],
                "unknown": 0,
                "by": "model",
            }
            for each in last
        ]
        if answer["results"] != expected:
            self.wrong.append(answer)


async def crowd_while(crowd, callers, meanwhile):
    tasks = [asyncio.create_task(crowd.call(seed)) for seed in range(callers)]
    other = asyncio.create_task(meanwhile)
    await asyncio.gather(*tasks)
    other.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await other


@pytest.mark.slow
def test_a_hundred_thousand_requests_with_changes_and_kills(tmp_path):
    fake_model.publish(tmp_path, 1)
    with contextlib.ExitStack() as servers:
        process, address = servers.enter_context(server_process.process(tmp_path, "poll=0.1"))
        port = int(address.split(":")[2])
        crowd = Crowd(port, 100_000)
        away = []

        async def change_and_kill():
            nonlocal process
            version = 1
            for step in range(1, 10_000):
                await asyncio.sleep(0.4)
                version += 1
                # Every fifth version is broken.
                fake_model.publish(tmp_path, 900 + version if version % 5 == 0 else version)
                if step % 12 == 0 and crowd.left > crowd.requests / 10:
                    fake_model.publish(tmp_path, version)
                    began = time.monotonic()
                    process.kill()
                    process.wait()
                    start = server_process.process(tmp_path, "poll=0.1", f"port={port}")
                    process, _ = await asyncio.to_thread(servers.enter_context, start)
                    away.append((began, time.monotonic()))

        asyncio.run(crowd_while(crowd, 16, change_and_kill()))
    assert crowd.wrong == []
    assert sum(crowd.answered.values()) == crowd.requests
    assert crowd.answered[400] > 1000
    assert len(crowd.versions) > 20
    assert away
    # Requests were only lost while the server was away.
    for began, ended in crowd.lost:
        assert any(began < end and ended > start for start, end in away)
    print(
        f"{crowd.requests} requests, versions {len(crowd.versions)}, kills {len(away)}, "
        f"lost while away {len(crowd.lost)}"
    )


def add_other_version(directory, number):
    """Adds a version whose items have the vectors of other items, so that it answers differently."""
    new = directory / "versions" / str(number)
    shutil.copytree(directory / "versions" / "1", new)
    file = new / "vectors.safetensors"
    content = bytearray(file.read_bytes())
    vectors = np.array(tensor_file.read(file)["vectors"])
    content[-vectors.nbytes :] = np.roll(vectors, number, axis=0).tobytes()
    file.write_bytes(content)
    manifest = json.loads((new / "manifest.json").read_text())
    manifest["version"] = number
    manifest["files"]["vectors.safetensors"]["sha256"] = hashlib.sha256(content).hexdigest()
    manifest["checksum"] = checksum_of(manifest)
    (new / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_real_versions_are_not_mixed(small_export, tmp_path):
    directory = tmp_path / "export"
    shutil.copytree(small_export.directory, directory)
    for number in (2, 3):
        add_other_version(directory, number)
    rows = [row for row in small_export.rows if row["item_id"]][:30]
    expected = {}
    for number in (1, 2, 3):
        model = s2s_serve.load(directory, version=number)
        expected[number] = [set(each.items) for each in model.recommend(rows, k=5)]
    assert expected[1] != expected[2] != expected[3]
    answered = []

    async def call(port, seed):
        draw, caller = random.Random(seed), Caller(port)
        while len(answered) < 10_000:
            chosen = [draw.randrange(len(rows)) for _ in range(draw.choice((1, 2, 4)))]
            body = {"histories": [rows[n] for n in chosen], "k": 5}
            status, answer = await caller.post("/v1/recommend", body)
            assert status == 200
            of_version = expected[answer["version"]]
            for n, result in zip(chosen, answer["results"], strict=True):
                # Joined histories may be rounded differently, which can exchange the last item.
                assert len(of_version[n] & set(result["items"])) >= 4
            answered.append(answer["version"])
        caller.close()

    async def change():
        for step in range(1, 10_000):
            await asyncio.sleep(0.3)
            fake_model.publish(directory, 1 + step % 3)

    async def crowd(port):
        changes = asyncio.create_task(change())
        await asyncio.gather(*(call(port, seed) for seed in range(8)))
        changes.cancel()

    with (
        server_process.app(directory, load=load) as app,
        server_process.in_thread(app.asgi) as address,
    ):
        asyncio.run(crowd(int(address.split(":")[2])))
        changes = app.metrics.reloads.labels("loaded")._value.get()
    assert changes > 10
    assert set(answered) == {1, 2, 3}
