"""Control: the int64 words on the device that say where a capture stands, and what each of them is."""

from __future__ import annotations

from enum import IntEnum


class Header(IntEnum):
    """Words of a lane."""

    OPEN = 0  # a forward is open
    FORWARDS = 1  # committed
    ERRORS = 2  # bits of Fault
    GOES_ON = 3  # the batch's earlier forwards count: a token shown again is reseen
    UNMASKED = 4  # nothing says which tokens of the open forward are real
    LABELS = 5  # where the labels come from, a Source
    BATCH = 6  # the number of the open batch, 0 where none is


class Station(IntEnum):
    """Words of one hook point and sink; from OFFERED on they are the ledger's."""

    FIRES = 0  # in the open forward
    BAD = 1  # rows of the open forward with NaN or Inf
    MISSED = 2  # forwards in which it did not fire as declared
    FORWARDS = 3
    UNMASKED = 4
    EXPECTED = 5
    SEEN = 6
    OFFERED = 7
    SELECTED = 8
    MASKED = 9
    SKIPPED = 10
    RESEEN = 11
    NONFINITE = 12
    ROLLED_BACK = 13
    DROPPED = 14  # selected rows of forwards for which there was no room


class Tally(IntEnum):
    """What a token rule makes of the open forward's positions."""

    OFFERED = 0
    KEPT = 1
    MASKED = 2
    SKIPPED = 3
    RESEEN = 4


class Place(IntEnum):
    """Words of a row that is on its way from the device to a store: whose it is."""

    BATCH = 0  # as in the header
    FORWARD = 1  # forwards committed before its own
    SEQUENCES = 2  # of the forward
    SEQUENCE = 3
    RANK = 4
    TOKEN = 5  # -1 where the model is shown none
    LABEL = 6


class Source(IntEnum):
    """How the labels of a batch are given."""

    NONE = 0
    SEQUENCE = 1  # one a sequence
    POSITION = 2  # one a position


class Fault(IntEnum):
    """What the device found wrong, to be raised by the host."""

    MISSED = 1  # a hook point did not fire as declared
    PADDING = 2  # padding ids, and no mask
    UNLABELLED = 4  # labels are needed, and no batch is open
    OVERRUN = 8  # rows were written over others that had not been fetched


WIDTH = 16  # words of a station, and of the header
PLACE_WIDTH = 8  # words of a row's place
