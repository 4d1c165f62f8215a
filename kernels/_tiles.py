"""The one tuning table: tile sizes by op. Fixed, so that nothing is tuned at run time and results do not depend on
it.
"""

# Steering: most columns and all elements of an addition's tile, 2 16-byte loads a thread in bf16, which leaves room for
# as many threads as there can be; up to STEER_FEW_ROWS rows a program has one of them.
STEER_BLOCK = 2048
STEER_ELEMENTS = 4096
STEER_FEW_ROWS = 256
# Edits of whole rows that stay in registers: most elements a warp holds, most warps of a tile, up to EDIT_FEW_COLUMNS
# and past them; most columns; most directions; programs to have before a tile gets more rows. Else by tensor cores,
# EDIT_WIDE rows by columns a step (warps, stages), up to EDIT_RANK directions.
EDIT_ELEMENTS = 1024
EDIT_WARPS = (8, 16)
EDIT_FEW_COLUMNS = 4096
EDIT_COLUMNS = 8192
EDIT_DIRECTIONS = 8
EDIT_PROGRAMS = 256
EDIT_WIDE = (16, 64, 4, 3)
EDIT_RANK = 64
SLOT_ROWS = 128  # rows a program selects at once

# Projection: rows, columns of a step, most readers of a program, warps and stages of a tile; each form serves from so
# many rows on. A wide tile, from sm_90, reads the readers from L2 half as often.
PROJECT = {
    "short": (16, 128, 16, 4, 4),
    "low": (64, 64, 64, 4, 4),
    "tall": (128, 32, 192, 8, 4),
    "wide": (256, 64, 192, 8, 3),
}
PROJECT_FROM = {"low": 32, "tall": 8192, "wide": 32768}
# Few readers, without tensor cores: most of them, elements of a tile of whole rows, most columns.
FEW_READERS = 8
FEW_ELEMENTS = 16384
FEW_COLUMNS = 8192
FEW_PROGRAMS = 256  # to have before a tile gets more rows
# Pooled scores: rows of a piece, whose sums are added in order.
POOL_ROWS = 64
POOL_COLUMNS = 64
POOL_WARPS = 4

# Sorting labels: the labels a program looks at in a step.
SORT_TILE = 2048
SORT_WARPS = 8

# Label sums: a label's rows are summed in pieces of FOLD_PIECE, by one warp that holds FOLD_ROWS rows by FOLD_BYTES, or
# FOLD_COLUMNS, so that every lane has FOLD_ROWS 16-byte loads on the way and adds its own columns.
FOLD_PIECE = 256
FOLD_ROWS = 8
FOLD_BYTES = 512
FOLD_COLUMNS = 128
FOLD_PROGRAMS = 16  # a multiprocessor: a warp of at most 128 registers a lane each
LABEL_SUMS_ROWS = 65536  # most rows of the op that are sorted at once
# Then the sums of the pieces, PARTS_DEEP at a time.
PARTS_DEEP = 8
PARTS_COLUMNS = 128
PARTS_WARPS = 2

# Norms that a program of settle reads in a step.
SETTLE_TILE = 4096
SETTLE_WARPS = 8

# The op stage: bytes of a tile of whole rows, a lane's share of it, and of the widest row that is held in one piece.
STAGE_BYTES = 8192
STAGE_LANE = 64
STAGE_WIDEST = 32768

# Rows and columns that a program of freeze reads at once, in float64.
FREEZE_ROWS = 32
FREEZE_COLUMNS = 32
FREEZE_WARPS = 8

# Elements of a tile of convert, and most of its columns: with fewer than threads, the shift needs no shared memory.
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

# Gram, a tile of 128 x 128, on every architecture: rows of a step, warps, stages. What bounds the tile are registers:
# beside the running chain, 64 a thread, stands the sum of the chains before it. 128 x 192 would fit, but only as two
# running chains, whose wgmma the assembler serialises. 4 stages are 128 KB on sm_90, and 96 KB on sm_80 and its likes.
GRAM_SHAPE = (64, 8, 4)
GRAM_ODD = (16, 8, 2)  # widths of no multiple of 16, which are loaded by 2 bytes through registers
GRAM_BAND = 8  # panels: 132 tiles at a time then read 25 panels, or 31 at most
GRAM_WORKERS = 132  # who share tiles that are cut, on any device: the multiprocessors of an H100 or H200
# Sums of the parts of a tile that was cut: rows that a program adds, and loads on the way at once.
GRAM_FOLD_ROWS = 8
GRAM_DEEP = 8
GRAM_FOLD_WARPS = 4
# The op gram: the rows of a peak; rows by columns of a tile of its rows, 16 elements a thread.
GRAM_PEAK_ROWS = 512
GRAM_ROWS_TILE = 16
GRAM_ROWS_COLUMNS = 128
GRAM_ROWS_WARPS = 4
