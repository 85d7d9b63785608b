"""The settings that determine the functions of a step."""

import dataclasses
from typing import Self

from s2s_jax.config import Config, LossConfig, LRConfig, ModelConfig, TableConfig
from s2s_jax.config.settings import Items


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings of the model, the loss, the tables and the optimizer.

    Attributes:
      items: the features of events, the item feature and the target features.
      tables: the settings of the tables that the features use.
      model: the sizes and options of the model.
      loss: the settings of the loss.
      lr: the learning rates and the settings of the optimizer.
      seed: the seed of initial values and of dropout.
      fsdp: whether the parameters of the model are sharded; otherwise they are replicated.
      microbatches: the number of microbatches of a step.
    """

    items: Items
    tables: tuple[TableConfig, ...]
    model: ModelConfig
    loss: LossConfig
    lr: LRConfig
    seed: int
    fsdp: bool
    microbatches: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the settings of a step of `config`."""
        return cls(
            items=Items.of(config),
            tables=config.tables,
            model=config.model,
            loss=config.loss,
            lr=config.lr,
            seed=config.train.seed,
            fsdp=config.train.dense_sharding == "fsdp",
            microbatches=config.train.gradient_accumulation_steps,
        )
