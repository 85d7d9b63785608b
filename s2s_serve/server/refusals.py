"""Requests that are not answered: a status and one sentence."""


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
      status: the status of HTTP.
      sentence: what is wrong.
      headers: additional headers.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = headers or {}
