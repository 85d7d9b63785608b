"""What a configuration assumes about the columns of a log, to check it against the log itself."""

import dataclasses
from typing import Literal, Self

from s2s_jax.config import Config, FeatureConfig
from s2s_jax.config.kinds import ByTime
from s2s_jax.config.settings import Decoding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The features and columns that training takes for items and times.

    Attributes:
      decoding: how training decodes rows.
      item: the feature whose ids are the items.
      pairing: the event that a prediction is compared with, see `loss.pairing`.
      time_feature: the feature whose column has the times of events; None if no feature has the name
        that `eval.split.feature` gives (or its default, without a split by time).
      paths: the paths of the log, for messages.
    """

    decoding: Decoding
    item: FeatureConfig
    pairing: Literal["next", "previous"]
    time_feature: FeatureConfig | None
    paths: str

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the assumptions of training."""
        split = config.eval.split
        name = split.feature if isinstance(split, ByTime) else ByTime.feature
        named = [f for f in config.features if f.name == name]
        return cls(
            decoding=Decoding.of(config),
            item=config.feature(config.loss.item_feature),
            pairing=config.loss.pairing,
            time_feature=named[0] if named else None,
            paths=config.io.data_paths,
        )
