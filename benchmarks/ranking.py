"""How fast is ranking in blocks, compared with one dense product, and does its memory stay constant?

    python benchmarks/ranking.py [--items 10000 1000000] [--large] [--devices 1] [--width 64]
    python benchmarks/ranking.py --users 20000 [--items 12000] [--events 9]

Alternates between `top_k`, `ranks` (both leave out 200 seen items per user) and a NumPy
product of users and all items followed by `argpartition` (no seen items, unsorted; as many users as fit
into 1 GiB of scores). Prints medians in users/s, and the memory that XLA allocates for `top_k` in
addition to the vectors. --large adds 10^7 items: 2.5 GB of vectors (5 GB with --width 128), held twice,
since NumPy has them too.

--users instead measures the whole path from a log to a file of recommendations (`s2s recommend`): a
synthetic log of so many users with --events events each on average, and a model of the sizes of
configs/ml1m.py (200 positions). It is measured with histories encoded at about their own lengths, and
with all histories padded to 200 positions, as in earlier versions. Then it measures what reading,
encoding and searching take alone, with all programs compiled.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_DENSE_SCORES = 2**28
_SEEN = 200


def temporary_bytes(ranked: Any, arrays: tuple, k: int) -> int:
    """The bytes that XLA allocates for `top_k` on all devices, without arguments and results."""
    from s2s_jax.ranking import top_k
    from s2s_jax.ranking.ranked_items import no_bias, padded

    users, seen, biases = padded(*arrays, no_bias(), ranked)
    lowered = top_k._top_k.lower(
        users, ranked.vectors_RE, ranked.items, seen, biases, k, ranked.blocks, ranked.mesh
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes * ranked.mesh.size


def measure(items: int, arguments: argparse.Namespace) -> None:
    # Imported only now, after the number of devices is set.
    import jax

    from s2s_jax.cluster.mesh import make_mesh
    from s2s_jax.data.items.seen import of_rows
    from s2s_jax.ranking import ranks, top_k
    from s2s_jax.ranking.ranked_items import put_items

    rng = np.random.default_rng(0)
    vectors_IE = rng.normal(size=(items, arguments.width)).astype(np.float32)
    users_BE = rng.normal(size=(arguments.batch, arguments.width)).astype(np.float32)
    seen = of_rows(rng.integers(0, items, (arguments.batch, _SEEN)).astype(np.int32))
    target_B = rng.integers(0, items, arguments.batch).astype(np.int32)
    dense_users = min(arguments.batch, max(1, _DENSE_SCORES // items))
    ranked = put_items(vectors_IE, make_mesh(), arguments.block_items)

    def dense() -> None:
        scores_BI = users_BE[:dense_users] @ vectors_IE.T
        np.argpartition(scores_BI, -arguments.top_k, axis=1)[:, -arguments.top_k :]

    def best() -> None:
        jax.block_until_ready(top_k.top_k(users_BE, ranked, arguments.top_k, seen))

    def rank() -> None:
        ranks.ranks(users_BE, target_B, ranked, seen).block_until_ready()

    runs = {"top_k": best, "ranks": rank, "dense": dense}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    users = {"top_k": arguments.batch, "ranks": arguments.batch, "dense": dense_users}
    speed = {name: users[name] / statistics.median(taken[1:]) for name, taken in times.items()}
    held = temporary_bytes(ranked, (users_BE, seen), arguments.top_k)
    print(
        f"{items:>12,} items: top_k {speed['top_k']:8.1f} users/s, ranks {speed['ranks']:8.1f}, "
        f"dense {speed['dense']:8.1f} (top_k {speed['top_k'] / speed['dense']:.1f} times it); "
        f"memory beyond the vectors {held / 2**20:.1f} MiB",
        flush=True,
    )


def trained(directory: Path, arguments: argparse.Namespace) -> Any:
    """Makes a log, trains two steps on it, and returns the configuration."""
    from s2s_jax.config import load_file
    from s2s_jax.data.logs.synthesize import Settings, synthesize
    from s2s_jax.jobs.train import train

    synthesize(
        Settings(
            output=directory / "log",
            users=arguments.users,
            items=arguments.items[0],
            mean_length=arguments.events,
        )
    )
    config = load_file(Path(__file__).parents[1] / "configs" / "ml1m.py")
    run = {"output_dir": str(directory / "run"), "train_epoch": None, "train_steps": 2}
    config = dataclasses.replace(
        config,
        io=dataclasses.replace(config.io, data_paths=str(directory / "log")),
        lr=dataclasses.replace(config.lr, warmup_steps=0),
        eval=dataclasses.replace(config.eval, every_steps=None),
        train=dataclasses.replace(config.train, **run),
    )
    train(config)
    return config


def whole_path(arguments: argparse.Namespace) -> None:
    from s2s_jax.data.batching.encoding_shapes import Shapes
    from s2s_jax.jobs import recommend as job

    by_length = job.shapes_for

    def padded_shapes(seq_len: int, batch_users: int, mesh: Any) -> Shapes:
        return Shapes((seq_len,), batch_users * seq_len, mesh.size)

    with tempfile.TemporaryDirectory() as name:
        config = trained(Path(name), arguments)
        request = job.Request(
            input=config.io.data_paths,
            output=Path(name) / "recs.parquet",
            top_k=arguments.top_k,
            checkpoint="newest",
        )
        seconds = {}
        for way, shapes in (("own lengths", by_length), ("padded", padded_shapes)):
            job.shapes_for = shapes
            begin, used = time.perf_counter(), time.process_time()
            job.recommend(config, request)
            seconds[way] = time.perf_counter() - begin
            print(
                f"{way:>12}: {arguments.users / seconds[way]:8.1f} users/s with start and compiling, "
                f"{seconds[way]:.1f} s, {time.process_time() - used:.1f} s of CPU time",
                flush=True,
            )
        print(f"{seconds['padded'] / seconds['own lengths']:.1f} times as fast")
        job.shapes_for = by_length
        parts(config, request)


def parts(config: Any, request: Any) -> None:
    """Prints how fast reading, encoding and searching are alone, each measured when all is compiled."""
    from s2s_jax.cluster.mesh import make_mesh
    from s2s_jax.config.settings import Logs
    from s2s_jax.data.batching.encoding_shapes import stretches
    from s2s_jax.jobs import recommend as job

    mesh = make_mesh()
    config, model = job._restored(config, request, mesh)
    log = job._log_of_items(config, request)
    items = job._items(config, request, log)
    answerer = job._answerer(config, dataclasses.replace(request, keep_seen=False), model, items)
    reader = job._reader(config, request, Logs.of(config), log, items, mesh.size)
    encoder, candidates = answerer._model.encoder, answerer._model.candidates
    for _ in range(2):
        marks = [time.perf_counter()]
        batches = list(reader.read_all(range(reader.stripes), None))
        marks.append(time.perf_counter())
        together = list(stretches(batches, encoder.shapes))
        encoded = [one for stretch in together for one in encoder.encode(stretch)]
        marks.append(time.perf_counter())
        for batch, of_batch in zip(batches, encoded, strict=True):
            candidates.top_k(of_batch.users_UE, request.top_k, batch)
        marks.append(time.perf_counter())
    users = sum(batch.users for batch in batches)
    for what, begin, end in zip(
        ("reading", "encoding", "searching"), marks, marks[1:], strict=False
    ):
        print(f"{what:>12}: {users / (end - begin):8.1f} users/s alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+")
    parser.add_argument("--users", type=int)
    parser.add_argument("--events", type=float, default=9)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--block_items", type=int, default=2**14)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    flag = f"--xla_force_host_platform_device_count={arguments.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax

    device = jax.devices()[0]
    print(
        f"batch {arguments.batch}, width {arguments.width}, top {arguments.top_k}, "
        f"{len(jax.devices())} x {device.platform} {device.device_kind}, "
        f"blocks of {arguments.block_items:,} items"
    )
    if arguments.users is not None:
        arguments.items = arguments.items or [12_000]
        whole_path(arguments)
        return
    for items in (arguments.items or [10**4, 10**6]) + [10**7] * arguments.large:
        measure(items, arguments)


if __name__ == "__main__":
    main()
