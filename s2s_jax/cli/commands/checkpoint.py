"""Converts checkpoints to and from PyTorch: `s2s checkpoint to-torch RUN_DIR --output FILE`."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro

from s2s_jax.cli.parsing import parse_with_overrides
from s2s_jax.config import load
from s2s_jax.errors import EXIT_DONE, UserError
from s2s_jax.jobs.checkpoint import from_torch, to_torch
from s2s_jax.storage.place_option import PlaceOption

_Direction = Literal["to-torch", "from-torch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """to-torch writes the weights of a checkpoint as tensors of the RecIS example in PyTorch. from-torch
    makes a run with a checkpoint of step 0 from such tensors, which s2s train continues with a new
    optimizer.
    """

    direction: Annotated[_Direction, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTION")]
    """to-torch, from a run to a file; or from-torch, from a file to a run"""
    source: Annotated[PlaceOption, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR_OR_FILE")]
    """to-torch: directory of the run (its train.output_dir); from-torch: .safetensors file, or .pt file
    if PyTorch is installed"""
    output: PlaceOption
    """to-torch: .safetensors or .pt file to write; from-torch: directory of the new run"""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """from-torch: config file of the new run. Any key can be overridden: --section.key VALUE"""
    checkpoint: str | None = None
    """to-torch: checkpoint to convert: best (by eval.metric), newest, or a step. None: best"""


def main(argv: list[str]) -> int:
    """Runs the command line `argv` and returns the exit code.

    Raises:
      UserError: the command line, the configuration, the run or the file is wrong.
    """
    given = parse_with_overrides(Arguments, argv, "checkpoint")
    if given is None:
        return EXIT_DONE
    arguments, overrides = given
    if arguments.direction == "to-torch":
        _to_torch(arguments)
    else:
        _from_torch(arguments, overrides)
    return EXIT_DONE


def _to_torch(arguments: Arguments) -> None:
    if arguments.config is not None:
        raise UserError(
            f"--config: expected none with to-torch, because the run has its configuration, found "
            f"{arguments.config}; remove it"
        )
    checkpoint = "best" if arguments.checkpoint is None else arguments.checkpoint
    done = to_torch(arguments.source, arguments.output, checkpoint)
    print(
        f"wrote {done.tensors} tensors with {done.parameters:,} values from the checkpoint of step "
        f"{done.step:,} to {arguments.output}"
    )


def _from_torch(arguments: Arguments, overrides: list[str]) -> None:
    if arguments.checkpoint is not None:
        raise UserError(
            f"--checkpoint: expected none with from-torch, found {arguments.checkpoint}; remove it"
        )
    if arguments.config is None:
        raise UserError(
            "--config: expected a path with from-torch, found nothing; give s2s checkpoint from-torch "
            "FILE --output RUN_DIR --config FILE"
        )
    config = load(arguments.config, overrides)
    train = dataclasses.replace(config.train, output_dir=str(arguments.output))
    done = from_torch(arguments.source, dataclasses.replace(config, train=train))
    print(
        f"wrote {done.tensors} tensors with {done.parameters:,} values from {arguments.source} to the "
        f"checkpoint of step {done.step} in {arguments.output}"
    )
    same = [str(arguments.config), *overrides, "--train.output_dir", str(arguments.output)]
    print(f"to train it: s2s train --config {shlex.join(same)}")
