"""Trees as netCDF files that end with a checksum, so that a damaged file is refused before HDF5 reads it.

HDF5 trusts what it reads: a file with zeros in its middle can make it search for ever, or crash the process, and numbers that
have changed are returned as they are. So the last line of a file of ours is the SHA-256 checksum of all before it. HDF5 reads
to the end that its own header gives, and so xarray, ArviZ, h5py and netCDF4 open the file as ever. An attribute of the root,
`sealed`, says that there is such a line: where it is missing, the file was cut, or written anew by another program.

A file without either, of an earlier version or of another program, is first read in a process of its own, which is ended
when it takes too long. That finds out what would hang or crash, and cannot find out numbers that have changed.

A full disk makes HDF5 crash, too: files are made in memory, and then written by us.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xarray as xr

from bayes_klrl.errors import CheckpointError
from bayes_klrl.whole_files import whole_file

__all__ = ["check_sealed", "write_sealed"]

_SEAL = b"bayes_klrl.sealed/1"
_ATTRIBUTE = {"sealed": f"{_SEAL.decode()}: the last line of this file is the SHA-256 checksum of all before it"}
_HEAD = b"\n" + _SEAL + b" sha256 "
_LENGTH = len(_HEAD) + 64 + 1
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PATIENCE, _BYTES_PER_SECOND = 20.0, 10e6
_READ = """
import sys, xarray
with xarray.open_datatree(sys.argv[1], engine="h5netcdf") as tree:
    for node in tree.subtree:
        for variable in node.variables.values():
            variable.values
"""


def write_sealed(tree: xr.DataTree, file: Path, encoding: Mapping[str, Any] | None = None) -> Path:
    """Write a tree to a netCDF file, whole or not at all, with a checksum at its end, and return its path.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    sealed = tree.copy()
    sealed.attrs = {**tree.attrs, **_ATTRIBUTE}
    content = sealed.to_netcdf(None, engine="h5netcdf", encoding=encoding)
    with whole_file(file) as unfinished, unfinished.open("wb") as opened:
        opened.write(content)
        opened.write(_HEAD + hashlib.sha256(content).hexdigest().encode() + b"\n")
    return file


def check_sealed(file: Path) -> bool:
    """Refuse a netCDF file that is damaged; return whether it has a checksum, which says that nothing has changed.

    Raises
    ------
    CheckpointError
        If it is no netCDF file, its checksum is another or is missing, or it cannot be read to its end.
    """
    with file.open("rb") as opened:
        if opened.read(len(_HDF5)) != _HDF5:
            raise CheckpointError(f"{str(file)!r} is no netCDF file, as Draws.save writes it, or its start is damaged.")
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(size - _LENGTH, 0))
        end = opened.read()
        if end.startswith(_HEAD):
            if _checksum(opened, size - _LENGTH) == end.removeprefix(_HEAD)[:-1] and end.endswith(b"\n"):
                return True
            raise CheckpointError(
                f"{str(file)!r} is damaged: its checksum is not the one that was written with it. Take a copy of before, or "
                "make the draws again from their seed."
            )
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(_SEAL) >= 0:
                raise CheckpointError(
                    f"{str(file)!r} is damaged: the checksum that was written at its end is missing. It was cut, something "
                    "was added to it, or another program wrote it anew; that one must drop the attribute `sealed`."
                )
    _check_in_a_process(file, _PATIENCE + size / _BYTES_PER_SECOND)
    return False


def _checksum(opened: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 checksum of the first bytes of a file, in hexadecimal digits."""
    digest, left = hashlib.sha256(), size
    opened.seek(0)
    while left and (block := opened.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def _check_in_a_process(file: Path, seconds: float) -> None:
    """Refuse a file that cannot be read in this time by a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", _READ, str(file)]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{str(file)!r} is damaged, and has no checksum: it was not read to its end in {seconds:.0f} seconds."
        ) from None
    if run.returncode:
        why = run.stderr.strip().splitlines()[-1:] if run.returncode > 0 else ["reading it crashes"]
        raise CheckpointError(f"{str(file)!r} cannot be read to its end, and has no checksum: {''.join(why)}.")
