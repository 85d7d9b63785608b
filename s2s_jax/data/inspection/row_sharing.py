"""Counts ids that share a table row with other ids.

Shapes: T ids, U distinct ids.
"""

# pyarrow.compute makes its functions at run time.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from s2s_jax.config import FeatureConfig
from s2s_jax.data.inspection.columns import share
from s2s_jax.data.inspection.distinct import hashes
from s2s_jax.data.inspection.hash_tally import HashTally
from s2s_serve.encoding import hashing, ids

# A warning is given if more than this share of the ids, or of their events, collide. Hashing always
# has some collisions; without hashing, ids that are spread over large numbers rarely collide.
_WORTH_WARNING = {None: 0.01, "murmur": 0.1, "farm": 0.1}


class RowSharing:
    """Counts the ids of a feature with buckets, and those that share a bucket."""

    def __init__(self, feature: FeatureConfig, is_item: bool):
        """Starts with nothing.

        Args:
          feature: a feature with op id and a `hash_bucket_size` above 0.
          is_item: whether this is the item feature.
        """
        assert feature.op == "id", "only features of op id can share rows"
        assert not feature.grows, "ids of a growing table share no rows"
        self._feature, self._is_item = feature, is_item
        self._tally = HashTally()
        self._smallest: int | None = None
        self._largest: int | None = None
        self._negative = 0

    def add(self, values: pa.Array) -> None:
        """Counts ids as stored in the log, without nulls."""
        if pa.types.is_integer(values.type) and len(values):
            ends = pc.min_max(values).as_py()
            known = [n for n in (self._smallest, self._largest) if n is not None]
            self._smallest = min([ends["min"], *known])
            self._largest = max([ends["max"], *known])
            if ends["min"] < 0:
                self._negative += int((values.to_numpy(zero_copy_only=False) < 0).sum())
        buckets_T = ids.to_buckets(values, self._feature).astype(np.int64)
        self._tally.add(hashes(values), hashing.hash_integers(buckets_T, "murmur"))

    def sentences(self) -> list[str]:
        """The number of ids for the table, for `s2s inspect`."""
        different, sharing, _ = self._counts()
        about = "" if self._tally.exact else "about "
        size = self._feature.hash_bucket_size
        return [
            f"Feature {self._feature.name}: {about}{self._tally.of_all(different):,} distinct ids for "
            f"{size:,} rows of its table; {share(sharing, different)} of those looked at share a row "
            f"with another"
        ]

    def warnings(self) -> list[str]:
        """Warnings if ids share rows unnecessarily, or are negative."""
        feature, warnings = self._feature, []
        different, sharing, of_events = self._counts()
        most = max(sharing / max(different, 1), of_events)
        if most > _WORTH_WARNING[feature.hash_type]:
            size = feature.hash_bucket_size
            if feature.hash_type is None:
                why = (
                    f"without hash_type ids outside 0 to {size - 1:,} wrap around, and they run from "
                    f"{self._smallest} to {self._largest}"
                )
                remedy = (
                    "raise hash_bucket_size above the largest id, set it to 0, or set hash_type"
                )
            else:
                why = f"hash_bucket_size {size:,} is small for them"
                remedy = "raise hash_bucket_size, or set it to 0 to give each id its own row"
            means = "the model cannot tell them apart"
            if self._is_item:
                means += ", and a hit on one counts for all of a row"
            warnings.append(
                f"warning: feature {feature.name}: {share(sharing, different)} of the distinct ids "
                f"looked at share a row of the table with another, {of_events:.1%} of the events have "
                f"such an id ({why}): {means}; {remedy}"
            )
        if self._negative and feature.hash_type is None:
            warnings.append(
                f"warning: feature {feature.name}: {self._negative:,} of the ids looked at are "
                f"negative (down to {self._smallest}) and treated like any other id; if they stand for "
                f"missing ids, write null instead"
            )
        return warnings

    def _counts(self) -> tuple[int, int, float]:
        """Number of distinct ids, number of those that share a row, and their share of the events."""
        _, group_U, count_U = self._tally.counts()
        _, row_U, ids_of_row = np.unique(group_U, return_inverse=True, return_counts=True)
        sharing_U = ids_of_row[row_U] > 1
        return len(group_U), int(sharing_U.sum()), count_U[sharing_U].sum() / max(count_U.sum(), 1)


def features_with_buckets(features: tuple[FeatureConfig, ...]) -> list[FeatureConfig]:
    """The features whose ids may share rows."""
    return [f for f in features if f.op == "id" and f.hash_bucket_size > 0]
