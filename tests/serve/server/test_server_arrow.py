"""Arrow's types that JSON does not have: lists of a fixed size, and columns without any id."""

import pyarrow as pa
import pytest
import server_process
from fake_model import publish
from test_server_routes import ARROW, post, stream


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    publish(directory, 1)
    with server_process.app(directory) as made:
        yield made


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ([[], [], None], pa.list_(pa.null())),
        ([[None, None], [], [None]], pa.large_list(pa.null())),
        ([[[], None], [], [[None]]], pa.list_(pa.list_(pa.null()))),
        ([None, None, None], pa.null()),
        ([[120, 121], None, [130, None]], pa.list_(pa.int64(), 2)),
        ([[[120], [121]], [], [None, [7]]], pa.list_(pa.list_(pa.int64(), 1))),
    ],
)
def test_lists_without_ids_and_of_a_fixed_size_are_answered_as_in_json(app, entries, kind):
    table = pa.table({"item_id": pa.array(entries, kind)})
    found = post(app, "/v1/recommend", stream(table), ARROW)
    wanted = post(app, "/v1/recommend", {"histories": [{"item_id": each} for each in entries]})
    assert (found.status_code, found.json()) == (200, wanted.json())


HUGE = 2**30


@pytest.mark.parametrize(
    "column",
    [
        pa.ListArray.from_arrays([0, HUGE], pa.nulls(HUGE)),
        pa.ListArray.from_arrays([0, 1], pa.ListArray.from_arrays([0, HUGE], pa.nulls(HUGE))),
        pa.FixedSizeListArray.from_arrays(pa.nulls(HUGE), HUGE),
        pa.ListArray.from_arrays([0, 1], pa.FixedSizeListArray.from_arrays(pa.nulls(HUGE), HUGE)),
        pa.ListArray.from_arrays(
            [0, HUGE],
            pa.Array.from_buffers(
                pa.list_(pa.int64(), 0), HUGE, [None], children=[pa.array([], pa.int64())]
            ),
        ),
    ],
    ids=["nulls", "bags", "fixed", "fixed bags", "no bags"],
)
def test_few_bytes_that_claim_many_nulls_are_refused(app, column):
    # Not as a table: it would be written in parts.
    batch = pa.record_batch({"item_id": column})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body = sink.getvalue().to_pybytes()
    assert len(body) < 2000
    answer = post(app, "/v1/recommend", body, ARROW)
    assert answer.status_code == 400
    assert f"an entry for each of its {len(body)} bytes" in answer.json()["error"]
