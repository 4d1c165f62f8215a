"""The one tuning table: tile sizes by op. Fixed, so that nothing is tuned at run time and results do not depend on
it.
"""

# Elements a program handles in a pass over rows; 8 warps of 16-byte accesses in bf16.
STEER_BLOCK = 2048
STEER_WARPS = 8

# Sorting labels: the labels a program looks at in a step.
SORT_TILE = 2048
SORT_WARPS = 8

# Label sums: a label's rows are summed in pieces of FOLD_PIECE, by one warp that holds FOLD_ROWS rows by FOLD_BYTES, so
# that every lane has FOLD_ROWS 16-byte loads on the way and adds its own columns.
FOLD_PIECE = 256
FOLD_ROWS = 8
FOLD_BYTES = 512
LABEL_SUMS_ROWS = 65536  # most rows of the op that are sorted at once
# Then the sums of the pieces: PARTS_DEEP at a time, a program for PARTS_LABELS labels.
PARTS_DEEP = 8
PARTS_LABELS = 8
PARTS_COLUMNS = 128
PARTS_WARPS = 2

# Rows and columns that a program of freeze reads at once, in float64.
FREEZE_ROWS = 64
FREEZE_COLUMNS = 32
FREEZE_WARPS = 8

# Elements of a tile of convert, and most of its columns: a row of a tile is one warp's, 16 bytes a thread.
CONVERT_TILE = 4096
CONVERT_COLUMNS = 128
CONVERT_WARPS = 8

# The forward: positions a program scans at once; elements of a tile of whole rows, and its widest row in one piece.
SCAN_BLOCK = 1024
ROW_ELEMENTS = 2048
ROW_BLOCK = 8192
STATION_BLOCK = 128

# Widths of residual streams whose kernels are compiled ahead of time.
WIDTHS = (384, 768, 1024, 2048, 4096, 8192)

# Directions that a program of track advances, one a thread.
TRACK_COLUMNS = 64
