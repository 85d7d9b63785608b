"""Requests that wait together are joined, one alone does not wait, and errors stay with their cause."""

import asyncio
import threading
import time

import pytest
import server_process
from fake_model import publish

from s2s_serve.errors import UserError

RECOMMEND = "/v1/recommend"


@pytest.fixture
def app(tmp_path):
    publish(tmp_path, 1)
    with server_process.app(tmp_path, max_batch=8, max_queue=20, timeout=5.0) as made:
        yield made


def body(*last, **rules):
    return {"histories": [{"item_id": [each]} for each in last], "k": 3, **rules}


async def while_busy(app, bodies):
    """Answers to requests that all arrive while the model answers another one."""
    async with app.client() as client:
        app.model.gate.clear()
        first = asyncio.ensure_future(client.post(RECOMMEND, json=body(110)))
        while not app.model.calls:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(client.post(RECOMMEND, json=each)) for each in bodies]
        while waiting(app) < len(bodies):
            await asyncio.sleep(0.001)
        app.model.gate.set()
        await first
        return [await each for each in others]


def waiting(app):
    return app.metrics.waiting._value.get()


def test_requests_that_wait_together_are_one_call(app):
    answers = asyncio.run(while_busy(app, [body(120), body(130, 140), body(150)]))
    assert app.model.calls == [1, 4]
    found = [[r["items"] for r in each.json()["results"]] for each in answers]
    assert found == [
        [[121, 122, 123]],
        [[131, 132, 133], [141, 142, 143]],
        [[151, 152, 153]],
    ]


def test_a_call_has_at_most_max_batch_histories_but_a_large_request_is_not_cut(app):
    sizes = [3, 3, 3, 9, 1]
    bodies = [body(*range(120, 120 + size)) for size in sizes]
    answers = asyncio.run(while_busy(app, bodies))
    assert [len(each.json()["results"]) for each in answers] == sizes
    # The last one still fits beside the first two.
    assert app.model.calls == [1, 7, 3, 9]


@pytest.mark.parametrize(
    "other",
    [
        {"k": 2},
        {"exclude": [121]},
        {"allow": [122]},
        {"where": {"genre": [1]}},
        {"keep_seen": True},
    ],
)
def test_requests_with_other_rules_run_apart(app, other):
    answers = asyncio.run(while_busy(app, [body(120), body(120, **other), body(130)]))
    assert app.model.calls == [1, 2, 1]
    assert answers[0].json()["results"][0]["items"] == [121, 122, 123]
    assert answers[2].json()["results"][0]["items"] == [131, 132, 133]


def test_values_that_are_equal_in_python_but_not_in_json_are_other_rules(app):
    values = [1, True, 1.0]
    asyncio.run(while_busy(app, [body(120, where={"genre": [v]}) for v in values]))
    assert app.model.calls == [1, 1, 1, 1]


def test_a_wrong_request_is_told_alone(app):
    bodies = [body(120), {"histories": [{"other": [1]}], "k": 3}, body(130), body(140)]
    answers = asyncio.run(while_busy(app, bodies))
    assert [each.status_code for each in answers] == [200, 400, 200, 200]
    # Its own row, not its place among the joined histories.
    assert answers[1].json()["error"] == "histories: row 0 has no item_id"
    assert answers[3].json()["results"][0]["items"] == [141, 142, 143]


def test_a_failure_of_the_model_is_told_alone(app):
    real = app.model.recommend

    def failing(histories, **rules):
        if any(h["item_id"] == [666] for h in histories):
            raise ZeroDivisionError
        return real(histories, **rules)

    app.model.recommend = failing
    answers = asyncio.run(while_busy(app, [body(120), body(666), body(130)]))
    assert [each.status_code for each in answers] == [200, 500, 200]
    assert answers[1].json() == {"error": "the server failed; its log says why"}


def test_a_single_request_does_not_wait_for_others(app):
    app.model.gate.set()

    async def one():
        began = time.perf_counter()
        await app.batcher.run(lambda model, histories: [0], [{}], b"", 5.0)
        return time.perf_counter() - began

    async def many():
        return min([await one() for _ in range(50)])

    # Thread switches only: a window for batching would be a millisecond or more.
    assert asyncio.run(many()) < 1e-3


def test_the_model_is_never_called_in_the_event_loop(app):
    answer = app.ask("POST", RECOMMEND, json=body(120))
    assert answer.status_code == 200
    app.ask("POST", "/v1/similar", json={"item": 120})
    app.ask("POST", "/v1/encode", json={"histories": [{"item_id": [1]}]})
    assert threading.current_thread().name not in app.model.threads
    assert all(name.startswith("s2s-model-") for name in app.model.threads)


def test_a_full_queue_and_a_slow_model_are_told_with_503(tmp_path):
    publish(tmp_path, 1)
    with server_process.app(tmp_path, max_queue=2, timeout=2.0) as app:

        async def crowd():
            async with app.client() as client:
                app.model.gate.clear()
                first = asyncio.ensure_future(client.post(RECOMMEND, json=body(120)))
                while not app.model.calls:
                    await asyncio.sleep(0.001)
                others = [client.post(RECOMMEND, json=body(120)) for _ in range(4)]
                answers = [await first, *await asyncio.gather(*others)]
                app.model.gate.set()
                last = await client.post(RECOMMEND, json=body(130))
                return answers, last

        answers, last = asyncio.run(crowd())
        assert [each.status_code for each in answers] == [503] * 5
        assert all(each.headers["retry-after"] == "1" for each in answers)
        errors = sorted(each.json()["error"] for each in answers)
        assert errors[:3] == ["the model did not answer within 2 s; try again"] * 3
        assert errors[3:] == ["too many requests wait; try again"] * 2
        # Those who had given up are not answered afterwards.
        assert last.json()["results"][0]["items"] == [131, 132, 133]
        assert app.model.calls == [1, 1]


def test_a_mistake_is_raised_to_its_caller(app):
    def wrong(model, histories):
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        asyncio.run(app.batcher.run(wrong, [{}], None, 5.0))
