"""Where results go: looked at before the work, and nothing half-written after it."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("m2d_ext")


def check_file(name: str, path: str | Path) -> None:
    """Before the work: whether a file can be written.

    Args:
        name: of the argument, for the error.
        path: of the file. Its folder need not exist yet.

    Raises:
        ValueError: it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{name} must be a file, but {path} is a folder")
    if not path.exists():
        _check_place(name, path)
    elif not os.access(path, os.W_OK):
        raise ValueError(f"{name} must be a file that can be written, but {path} cannot")


def check_folder(name: str, path: str | Path, overwrite: bool = False) -> None:
    """Before the work: whether a model can be written to a folder that is new or empty.

    Args:
        name: of the argument, for the error.
        path: of the folder.
        overwrite: whether it may be a folder that holds a model, too.

    Raises:
        ValueError: it cannot.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name} must be a folder, but {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{name} must be new or empty, but {path} exists and is not an empty folder")
        # What else there may be, a wrong path or a home, is not thrown away.
        if not (path / "modules.json").is_file():
            raise ValueError(f"{name} must be a model's folder to be overwritten, but {path} has no modules.json")
    _check_place(name, path)


def _check_place(name: str, path: Path) -> None:
    """Whether something can be made there. Why not, is left for the operating system to say."""
    path = path.absolute()
    folder = next(each for each in (path, *path.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be where files can be written, but {folder}: {error.strerror}") from error


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes its place when it is whole.

    It lies beside its place, or in it where that exists: that may be a mounted volume or the working folder. After an
    error everything is as it was.

    Args:
        path: its place.
        overwrite: whether a model may be there, which is replaced with all that its folder holds.

    Raises:
        ValueError: as ``check_folder``.
        OSError: what is there cannot be moved.
    """
    check_folder("output", path, overwrite)
    path = Path(path).resolve()
    is_new = not path.exists()
    missing = [parent for parent in path.parents if not parent.exists()]
    home = path.parent if is_new else path
    home.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".m2d-", dir=home) as scratch:
            folder = Path(scratch, path.name)  # with the usual permissions, which the one around it has not
            folder.mkdir()
            yield folder
            if is_new:
                folder.rename(path)
            else:
                _replace_contents(path, folder, Path(scratch))
    finally:
        for parent in missing:
            with suppress(OSError):  # the new folder is in it
                parent.rmdir()


def _replace_contents(place: Path, folder: Path, scratch: Path) -> None:
    """The old entries go out of the way, the new ones in, and only then are the old ones deleted.

    Raises:
        OSError: one cannot be moved. All are back where they were.
    """
    old = Path(tempfile.mkdtemp(prefix=".m2d-old-", dir=place))
    moves = [(entry, old / entry.name) for entry in place.iterdir() if entry not in (scratch, old)]
    moves += [(entry, place / entry.name) for entry in folder.iterdir()]
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        for source, target in reversed(moves):
            if not os.path.lexists(source):
                with suppress(OSError):  # one that stays in old is not lost, and the others go back
                    target.rename(source)
        with suppress(OSError):
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():  # it held what others may delete alone: no reason to take the new model back
        logger.warning("The model in %s is replaced, but what was there cannot be deleted: it is in %s", place, old)
