"""One sentence, with its file and the remedy, for what an analysis wrote and nobody can read any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from extract.errors import BadInput


def damaged(path: Path, error: Exception, line: int | None = None) -> BadInput:
    """What to raise for a file that a reader stumbled over with `error`."""
    place = f"{path}, line {line}," if line else str(path)
    said = " ".join(str(error).split()) or type(error).__name__
    return BadInput(
        f"{place} cannot be read ({said}): the file was cut off or altered. Remove it and run `python -m analysis` "
        "again, which writes it anew."
    )


@contextmanager
def readable(path: Path, line: int | None = None) -> Iterator[None]:
    """Within, nothing is done but reading `path`: whatever parsers raise becomes the sentence."""
    try:
        yield
    except (BadInput, FileNotFoundError):
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:  # pyarrow's and json's errors are among them
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: no permission, say; the file may be whole
        raise damaged(path, error, line) from error
