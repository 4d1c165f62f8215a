"""The one tuning table: tile sizes by op. Fixed, so that nothing is tuned at run time and results do not depend on
it.
"""

# Elements a program handles in a pass over rows; 8 warps of 16-byte accesses in bf16.
STEER_BLOCK = 2048
STEER_WARPS = 8
