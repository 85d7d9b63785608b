"""Writes the report of a run, a self-contained HTML page.

The page shows headline numbers, curves, the growth of tables, evaluations, the configuration and, for
some users, their last events beside the recommendations of the best checkpoint.
"""

import contextlib
import math
import sys
from pathlib import Path

from s2s_jax.cluster.mesh import make_mesh
from s2s_jax.config import Config, load_json
from s2s_jax.config.settings import Decoding, Items, Logs, Ranking, ShownHistory, Split
from s2s_jax.data.batching.histories import HistoryReader
from s2s_jax.data.encoding import held_out
from s2s_jax.data.encoding.indexing import index_files
from s2s_jax.data.items.catalogue import collect
from s2s_jax.data.items.titles import read_titles
from s2s_jax.errors import UserError
from s2s_jax.ranking.candidates import make_candidates
from s2s_jax.ranking.encode import UserEncoder, shapes_for
from s2s_jax.ranking.neighbour_bias import count_bias
from s2s_jax.ranking.restored import restore
from s2s_jax.reporting.record import read_record
from s2s_jax.reporting.report_page import make_page
from s2s_jax.reporting.shown_users import ExampleUsers, Shown, ShownUser, spread_over_log
from s2s_serve.encoding.item_numbers import ItemNumbers
from s2s_serve.storage.address import Place, StorePath, place_of


def report(
    run_dir: Place, output: Place | None = None, users: int = 5, titles: Place | None = None
) -> Place:
    """Writes the report of a run.

    Args:
      run_dir: the run directory.
      output: the HTML file to write; None: report.html in the run directory.
      users: the number of users to show; 0: none.
      titles: a file with the titles of items, see `read_titles`; None: items are shown by their ids.

    Returns:
      The path of the written file.

    Raises:
      UserError: there is no run, the titles cannot be read, or the page cannot be written.
    """
    config = load_json(run_dir / "config.json")
    title_of = {} if titles is None else read_titles(titles)
    record = read_record(run_dir, config.eval)
    shown = _shown(config, run_dir, users)
    output = run_dir / "report.html" if output is None else output
    _write(output, make_page(config, record, shown, title_of))
    return output


def _shown(config: Config, run_dir: Place, users: int) -> Shown | str:
    """Users to show, or the reason why there are none, which is also printed.

    A failure here does not stop the report, because the rest of it needs no checkpoints and logs.
    """
    if users == 0:
        return ""
    try:
        return show_users(config, run_dir, users)
    except UserError as error:
        reason = str(error)
        paths = [place_of(name.strip()) for name in config.io.data_paths.split(",")]
        relative = any(isinstance(path, Path) and not path.is_absolute() for path in paths)
        if reason.startswith("io.data_paths") and relative:
            reason += "; relative paths start from the directory in which this command is started"
        print(f"no users are shown: {reason}", file=sys.stderr, flush=True)
        return reason


def show_users(config: Config, run_dir: Place, users: int) -> Shown:
    """Restores the best checkpoint, or the newest if none was evaluated, and recommends items.

    Args:
      config: the configuration of the run.
      run_dir: the run directory, which may have been moved.
      users: the number of users to show, at least 1; they are taken from stripes all over the log.

    Raises:
      UserError: there is no checkpoint, or the checkpoint or the log cannot be read.
    """
    logs, items, split = Logs.of(config), Items.of(config), Split.of(config)
    index = index_files(logs, Decoding.of(config))
    mesh = make_mesh()
    run = restore(config, mesh, run_dir=run_dir)
    config = run.with_weight(config)
    catalogue = collect(items, logs, index, held_out.catalogue_cut(split))
    numbers = ItemNumbers(catalogue.ids[items.item.name])
    users_of_stripe = math.ceil(users / len(index.stripes))
    batch_users = math.ceil(users_of_stripe / mesh.size) * mesh.size
    reader = HistoryReader(ShownHistory.of(config), logs, index, numbers, batch_users)
    ranking = Ranking.of(config)
    neighbours = count_bias(ranking, split, logs, Decoding.of(config), catalogue)
    candidates = make_candidates(run.functions, run.state, catalogue, ranking, mesh, neighbours)
    shapes = shapes_for(config.model.seq_len, users_of_stripe, mesh)
    encoder = UserEncoder(run.functions, run.state, shapes, mesh)
    examples = ExampleUsers(encoder, candidates, catalogue.item, split)
    targets = held_out.targets(split, "test") if split.holds_out else None
    shown: list[ShownUser] = []
    for stripe, batch in spread_over_log(reader, users, targets):
        wanted = min(users_of_stripe, batch.users, users - len(shown))
        shown += examples.show(batch, wanted, index.stripes[stripe][0].path.name)
        if len(shown) == users:
            break
    return Shown(run.step, len(catalogue.item), catalogue.collisions, shown)


def _write(out: Place, page: str) -> None:
    if isinstance(out, StorePath):
        out.write_text(page)
        return
    if out.is_dir():
        raise UserError(
            f"--output: {out} is a directory; give a file such as {out / 'report.html'}"
        )
    # Moved to its place when complete, so that nobody ever sees a partial page.
    unfinished = out.with_name(f".{out.name}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(
            f"--output: {out} cannot be written ({error}); give a file in a directory that exists"
        ) from error
