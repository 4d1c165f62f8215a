"""The words of emocore/control.py for kernels; a test holds the two together."""

import triton.language as tl

WIDTH, TALLIES = tl.constexpr(16), tl.constexpr(5)
OPEN, FORWARDS, ERRORS, GOES_ON, UNMASKED = (tl.constexpr(i) for i in range(5))
FIRES, BAD, MISSED, COMMITTED, COMMITTED_UNMASKED, EXPECTED, SEEN = (tl.constexpr(i) for i in range(7))
OFFERED, SELECTED, MASKED, SKIPPED, RESEEN, NONFINITE, ROLLED_BACK = (tl.constexpr(i) for i in range(7, 14))
TALLY_OFFERED, TALLY_KEPT, TALLY_MASKED, TALLY_SKIPPED, TALLY_RESEEN = (tl.constexpr(i) for i in range(5))
FAULT_MISSED, FAULT_PADDING, FAULT_UNLABELLED = (tl.constexpr(1 << i) for i in range(3))
SOURCE_NONE, SOURCE_SEQUENCE = tl.constexpr(0), tl.constexpr(1)
