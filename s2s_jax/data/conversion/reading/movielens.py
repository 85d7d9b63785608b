"""Reads MovieLens as it is downloaded: its ratings, and the genres of its movies."""

from pathlib import Path

from s2s_jax.data.conversion.reading.text_files import CsvFormat, read_header, read_rows
from s2s_jax.data.conversion.selection import Feature, Selection
from s2s_jax.errors import UserError

RATINGS = ("ratings.dat", "ratings.csv")
_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_NO_GENRES = "(no genres listed)"


def find(directory: Path) -> Path | None:
    """The file of ratings in a directory; None if there is none."""
    return next((path for name in RATINGS if (path := directory / name).is_file()), None)


def is_movielens(ratings: Path) -> bool:
    """Whether a file of ratings has the columns of MovieLens; other logs may have the same file name."""
    form = ratings_format(ratings)
    if form.columns is None:
        return set(_COLUMNS) <= set(read_header(ratings, form))
    row = next(read_rows(ratings, form, "latin-1"), [])
    return len(row) == len(_COLUMNS) and row[-1].isascii() and row[-1].isdigit()


def notes(ratings: Path) -> list[str]:
    """Notes about the files, a sentence each."""
    movies = _movies(ratings)
    if movies.is_file():
        return []
    return [
        f"warning: there is no {movies.name} beside {ratings}, so there are no genres (cate_id)"
    ]


def ratings_format(ratings: Path) -> CsvFormat:
    """The format of a ratings file; its columns are userId, movieId, rating, timestamp."""
    if ratings.suffix == ".dat":
        return CsvFormat("::", "", _COLUMNS)
    return CsvFormat(",", '"', None)


def read_genres(ratings: Path) -> dict[str, list[str]] | None:
    """The genres of each movie, from the file next to `ratings`; None if there is none.

    Raises:
      UserError: a line of the file is not `movieId, …, genres`, or a movie is in it twice.
    """
    path = _movies(ratings)
    if not path.is_file():
        return None
    # MovieLens-1M is in Latin-1, 10M and later in UTF-8. Movies and genres are ASCII; titles do not
    # matter.
    encoding = "latin-1" if path.suffix == ".dat" else "utf-8-sig"
    form = ratings_format(ratings)
    genres: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path, form, encoding), 1):
        if form.columns is None and number == 1:
            continue
        if len(row) < 3 or row[0] in genres:
            found = f"movie {row[0]} twice" if len(row) >= 3 else f"{len(row)} columns"
            raise UserError(
                f"{path}: line {number}: expected a movie, its title and its genres, found {found}; "
                f"fix the line"
            )
        genres[row[0]] = [] if row[-1] == _NO_GENRES else [g for g in row[-1].split("|") if g]
    return genres


def _movies(ratings: Path) -> Path:
    return ratings.with_name(f"movies{ratings.suffix}")


def selection(ratings: Path) -> Selection:
    """Movies as items, ratings as behaviors and, if the file of movies exists, genres as categories.

    Raises:
      UserError: the movies cannot be read.
    """
    features = [Feature(name="item_id", column="movieId")]
    genres = read_genres(ratings)
    if genres is not None:
        features.append(Feature(name="cate_id", column="movieId", ids=genres))
    features.append(Feature(name="behavior_id", column="rating", prefix="rate"))
    return Selection(user="userId", time="timestamp", features=tuple(features))
