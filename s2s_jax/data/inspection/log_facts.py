"""Facts about the times, users and ids of a log, and warnings about likely mistakes."""

from collections.abc import Mapping

import pyarrow as pa

from s2s_jax.data.inspection import user_rows
from s2s_jax.data.inspection.assumptions import Assumptions
from s2s_jax.data.inspection.row_sharing import RowSharing, features_with_buckets
from s2s_jax.data.inspection.time_facts import TimeFacts, time_columns
from s2s_jax.data.inspection.user_rows import UserRows
from s2s_jax.errors import UserError
from s2s_serve.encoding.arrow import leaves
from s2s_serve.encoding.feature import EventTime
from s2s_serve.encoding.features import check_column


class LogFacts:
    """Collects facts about a log, stripe by stripe."""

    def __init__(
        self, assumptions: Assumptions | None, user: str | None = None, most_ids: int | None = None
    ):
        """Starts with nothing.

        Args:
          assumptions: which columns are times, in which unit, and how ids become table rows. None: time
            columns are found by name and type, and table rows are not checked.
          user: the column with user ids; None: found by name.
          most_ids: the number of ids of a feature that are checked in each stripe; None: all.
        """
        self._assumptions, self._user, self._most_ids = assumptions, user, most_ids
        self._times: dict[str, TimeFacts] = {}
        self._users: UserRows | None = None
        self._sharing: dict[str, RowSharing] = {}

    @property
    def has_users(self) -> bool:
        """Whether a column with user ids was found."""
        return self._users is not None

    def add(self, arrays: Mapping[str, pa.Array]) -> None:
        """Adds the columns of a stripe, by name."""
        schema = pa.schema([(name, array.type) for name, array in arrays.items()])
        for name, unit in time_columns(schema, self._assumptions).items():
            self._times.setdefault(name, TimeFacts(name, unit)).add(arrays[name])
        user = user_rows.user_column(schema) if self._user is None else self._user
        if user is not None and user_rows.is_user_column(schema, user):
            self._users = UserRows(user) if self._users is None else self._users
            self._users.add(arrays[user])
        if self._assumptions is not None:
            # It does not matter which times share a table row.
            times = time_columns(schema, None)
            ids = {name: array for name, array in arrays.items() if name not in times}
            self._add_ids(ids, self._assumptions)

    def _add_ids(self, arrays: Mapping[str, pa.Array], assumptions: Assumptions) -> None:
        for feature in features_with_buckets(assumptions.decoding.features):
            name = feature.column_name
            # Training refuses other columns with its own message.
            if name not in arrays or check_column(arrays[name].type, feature, "") is not None:
                continue
            is_item = feature.name == assumptions.item.name
            sharing = self._sharing.setdefault(feature.name, RowSharing(feature, is_item))
            sharing.add(leaves(arrays[name])[: self._most_ids])

    def refuse_untrue_times(self) -> None:
        """Refuses a log whose times cannot be true, if the model's attention depends on them.

        Raises:
          UserError: says what was found instead.
        """
        assert self._assumptions is not None, "they name the column"
        for feature in self._assumptions.decoding.features:
            name = feature.column_name
            if isinstance(feature, EventTime) and name in self._times:
                found = self._times[name].why_untrue()
                if found is not None:
                    raise UserError(
                        f"model.time_bias: expected true times in column {name} "
                        f"(model.time_bias.column), found {found}; correct the column or its time_unit, "
                        f"or set model.time_bias to none"
                    )

    def sentences(self) -> list[str]:
        """All facts, for `s2s inspect`."""
        sentences = [] if self._users is None else self._users.sentences()
        for facts in (*self._times.values(), *self._sharing.values()):
            sentences += facts.sentences()
        return sentences

    def warnings(self) -> list[str]:
        """Warnings about likely mistakes, a sentence each."""
        warnings = [] if self._users is None else self._users.warnings()
        for facts in (*self._times.values(), *self._sharing.values()):
            warnings += facts.warnings()
        return warnings
