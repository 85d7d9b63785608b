"""Places in the order of all epochs, and the places at which batches begin."""

from typing import NamedTuple


class Place(NamedTuple):
    """A place in the order of all epochs: an epoch, and a row of its order."""

    epoch: int
    row: int


BEGINNING = Place(0, 0)


class BatchPlaces(NamedTuple):
    """How epochs are cut into batches, from some place on.

    Attributes:
      batch_rows: rows of the log in a global batch.
      drop_remainder: whether the last batch of an epoch is left out if it is not full.
      start: place of batch 0.
      first_rows: rows of the epoch of `start`.
      rows: rows of every later epoch.
    """

    batch_rows: int
    drop_remainder: bool
    start: Place
    first_rows: int
    rows: int

    def batches(self, rows: int) -> int:
        """Number of batches from the last `rows` rows of an epoch."""
        return rows // self.batch_rows if self.drop_remainder else -(-rows // self.batch_rows)

    def until(self, epoch: int) -> int:
        """Number of batches before the first one of `epoch`."""
        if epoch <= self.start.epoch:
            return 0
        between = epoch - self.start.epoch - 1
        return self._in_first_epoch + between * self.batches(self.rows)

    def of(self, number: int) -> Place:
        """The place at which batch `number` begins."""
        first = self._in_first_epoch
        if number < first:
            return self.start._replace(row=self.start.row + number * self.batch_rows)
        epochs, batch = divmod(number - first, self.batches(self.rows))
        return Place(self.start.epoch + 1 + epochs, batch * self.batch_rows)

    @property
    def _in_first_epoch(self) -> int:
        return self.batches(self.first_rows - self.start.row)
