"""The numbers of items: their places in a catalogue, found by their encoded ids.

Shapes: I items, K ids of a bag, W words of an id, P positions.
"""

import numpy as np

from s2s_serve.encoding.blocks import NO_ID


class ItemNumbers:
    """Maps encoded ids of items to indices into a catalogue."""

    def __init__(self, ids_IK: np.ndarray):
        """Sorts items by their encoded ids, `[I, 1]` or `[I, 1, 2]` (see `Catalogue.ids`)."""
        code_I = codes_of(ids_IK.reshape(len(ids_IK), -1))
        self._number_I = np.argsort(code_I, kind="stable")
        self._code_I = code_I[self._number_I]

    def of(self, code_P: np.ndarray) -> np.ndarray:
        """int32 `[P]` indices of items; -1 for items outside the catalogue, and for `NO_ID`."""
        place_P = np.searchsorted(self._code_I, code_P)
        place_P = np.minimum(place_P, len(self._code_I) - 1)
        found_P = (self._code_I[place_P] == code_P) & (code_P != NO_ID)
        return np.where(found_P, self._number_I[place_P], -1).astype(np.int32)


def codes_of(ids_PW: np.ndarray) -> np.ndarray:
    """Return int64 `[P]`: buckets, or 64-bit ids made from their words; `NO_ID` for missing ids.

    Examples:
      >>> codes_of(np.array([[5, 0], [5, 1], [-1, -1]], np.int32)).tolist()
      [5, 4294967301, -1]
    """
    if ids_PW.shape[1] == 1:
        return ids_PW[:, 0].astype(np.int64)
    return np.ascontiguousarray(ids_PW).astype("<i4", copy=False).view("<i8")[:, 0].astype(np.int64)
