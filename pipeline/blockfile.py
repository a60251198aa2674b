"""A file without a name: aligned transfers around the page cache, room asked for before it is used."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from ctypes import CDLL, c_int, c_int64, get_errno
from functools import cache
from typing import Any

from sidelane.errors import LaneError
from sidelane.pipeline.pool import GRANULE

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Extent:
    """A range of the file."""

    def __init__(self, file: BlockFile, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self._file = file

    def close(self) -> None:
        self._file.punch(self.start, self.nbytes)


class BlockFile:
    """Transfers of whole granules; the memory is aligned to them too.

    Attributes:
        direct: whether transfers pass by the page cache.

    Raises LaneError when the folder takes no file.
    """

    def __init__(self, folder: str | None) -> None:
        if not isinstance(folder, (str, type(None))):
            raise LaneError(f"folder={folder!r} is not the name of a folder, or None")
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LaneError(f"folder={folder!r} takes no file: {reason}") from error
        self._end = 0
        self.direct = self._set_direct(True)

    def extend(self, nbytes: int, reserve: int) -> Extent:
        """Room for `nbytes` more, taken from the file system now so that writes find it.

        Raises OSError, also when less than `reserve` bytes would be left on the file system.
        """
        fd = self._file.fileno()
        system = os.fstatvfs(fd)
        if system.f_bavail * system.f_frsize - reserve < nbytes:
            raise OSError(errno.ENOSPC, f"less than {reserve >> 20} MiB would be left on the disk")
        if code := _fallocate(fd, 0, self._end, nbytes):
            if code in FULL:
                raise OSError(code, os.strerror(code))
            os.ftruncate(fd, self._end + nbytes)  # no way to ask for room: writes may fail later
        self._end += nbytes
        return Extent(self, self._end - nbytes, nbytes)

    def punch(self, start: int, nbytes: int) -> None:
        if not self._file.closed:
            _fallocate(self._file.fileno(), _PUNCH_HOLE, start, nbytes)

    def write(self, data: memoryview, offset: int) -> None:
        self._transfer(os.pwritev, data, offset)

    def read(self, data: memoryview, offset: int) -> None:
        self._transfer(os.preadv, data, offset)

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _transfer(self, call: Any, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                n = call(self._file.fileno(), [data[done:]], offset + done)
            except OSError as error:
                # Some file systems take the flag and refuse the transfer.
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self.direct = self._set_direct(False)
                continue
            n -= n % GRANULE if done + n < len(data) else 0
            if n <= 0:
                raise OSError(errno.EIO, f"transfer ended after {done} of {len(data)} bytes")
            done += n

    def _set_direct(self, wanted: bool) -> bool:
        fd, direct = self._file.fileno(), getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
        except OSError:
            return False
        return wanted and bool(direct)


@cache
def _libc() -> CDLL:
    libc = CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [c_int, c_int, c_int64, c_int64]
    return libc


def _fallocate(fd: int, mode: int, start: int, nbytes: int) -> int:
    """fallocate(2): 0 or errno. os.posix_fallocate writes zeros where the file system has no such call."""
    return 0 if _libc().fallocate(fd, mode, start, nbytes) == 0 else get_errno()
