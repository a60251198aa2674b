"""Context managers over driver resources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

from sidelane.errors import DriverError

Owner = TypeVar("Owner", bound="Closing")


class Closing(ABC):
    """Base of what has to be closed: a context manager whose `close` does not hide the error of its block."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self: Owner) -> Owner:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except DriverError:
            if error is None:
                raise
