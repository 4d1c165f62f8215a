"""faults.c for the process that it is preloaded into."""

import ctypes
import enum
import os
from pathlib import Path


class Plan(enum.IntEnum):
    """What is done to the calls on files below a folder; the numbers are those of faults.c."""

    COUNT, KILL, FAIL, SHORT, RECORD = range(5)


def begin(below: Path, plan: Plan, at: int = 0, error: int = 0, every: bool = False, record: int = -1) -> None:
    """Call number `at` is the last one, or fails with `error`, and so does `every` later one; a record has them all."""
    _library().faults_begin(os.fsencode(below), int(plan), ctypes.c_long(at), error, int(every), record)


def end() -> int:
    """The calls so far are counted, the next ones go through."""
    return int(_library().faults_end())


def failed() -> str:
    """The name of the first call that failed."""
    return bytes(_library().faults_first()).decode()


def mark(number: int) -> None:
    """A line in the record."""
    _library().faults_mark(ctypes.c_long(number))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.faults_end.restype, library.faults_first.restype = ctypes.c_long, ctypes.c_char_p
    return library
