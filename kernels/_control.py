"""The words of emocore/control.py for kernels; a test holds the two together."""

import triton.language as tl

WIDTH, TALLIES, PLACE_WIDTH = tl.constexpr(16), tl.constexpr(5), tl.constexpr(8)
OPEN, FORWARDS, ERRORS, GOES_ON, UNMASKED, LABELS, BATCH = (tl.constexpr(i) for i in range(7))
FIRES, BAD, MISSED, COMMITTED, COMMITTED_UNMASKED, EXPECTED, SEEN = (tl.constexpr(i) for i in range(7))
OFFERED, SELECTED, MASKED, SKIPPED, RESEEN, NONFINITE, ROLLED_BACK, DROPPED = (tl.constexpr(i) for i in range(7, 15))
TALLY_OFFERED, TALLY_KEPT, TALLY_MASKED, TALLY_SKIPPED, TALLY_RESEEN = (tl.constexpr(i) for i in range(5))
FAULT_MISSED, FAULT_PADDING, FAULT_UNLABELLED, FAULT_OVERRUN = (tl.constexpr(1 << i) for i in range(4))
PLACE_BATCH, PLACE_FORWARD, PLACE_SEQUENCES, PLACE_SEQUENCE, PLACE_RANK, PLACE_TOKEN, PLACE_LABEL = (
    tl.constexpr(i) for i in range(7)
)
SOURCE_NONE, SOURCE_SEQUENCE = tl.constexpr(0), tl.constexpr(1)
