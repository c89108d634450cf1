"""Writing files so that a killed process or a full disk leaves nothing half-written."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worldloop.errors import UserError

PathLike = str | os.PathLike[str]


def fsync_path(path: PathLike) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(path: PathLike, error: BaseException) -> UserError | None:
    """The clear error for a disk that is full or not writable, or None for anything else."""
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code in (errno.ENOSPC, errno.EDQUOT) or "code: 28," in text or "os error 28" in text:
        return UserError(f"{path}: the disk is full; free some space or choose another folder")
    if code in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path}: not writable; choose another folder or change its permissions")
    if code in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path}: a file stands where a folder is needed; choose another name")
    return None


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path in the same folder that is renamed to `path` on success.

    On any error the temporary file is removed and an earlier `path` stays as it was.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, final)
        fsync_path(final.parent)
    except BaseException as error:
        if final.parent.is_dir():
            temporary.unlink(missing_ok=True)
        clear = disk_error(final, error)
        if clear is not None:
            raise clear from error
        raise


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Write `data` to `path`: afterwards the file is whole, old or new."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: PathLike, text: str) -> None:
    """Write `text` as UTF-8 to `path`: afterwards the file is whole, old or new."""
    atomic_write_bytes(path, text.encode("utf-8"))


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def left_behind(number: str) -> bool:
    """Whether what bears this process number was left by a process that is no more.

    Our own number is that of an earlier process, too: in a container they repeat.
    """
    if not number.isdigit() or number == str(os.getpid()):
        return number.isdigit()
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def new_folder(path: PathLike) -> Iterator[Path]:
    """A folder beside `path` that takes its name when everything in it is written.

    On any error it is removed. Raises UserError where `path` exists, and for a disk that is full.
    """
    final = Path(path)
    if final.exists():
        raise UserError(f"{final}: exists; choose another folder, or delete it")
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        for left in final.parent.glob(f".{final.name}.*.tmp"):  # by killed processes
            if left_behind(left.name.removeprefix(f".{final.name}.").removesuffix(".tmp")):
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, final)
        fsync_path(final.parent)
    except OSError as error:
        raise disk_error(final, error) or error from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive(folder: PathLike) -> Iterator[None]:
    """Keep other processes out of a run's folder; the kernel lets go when a process dies.

    Raises UserError when another one is in it.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - closed below, after the lock
    except OSError as error:
        raise disk_error(path, error) or error from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process is working in it; wait for it, or choose another folder"
            ) from error
        yield
