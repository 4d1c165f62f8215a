"""Bridges into other people's loops; each module is imported only when it is used, and needs its own library."""
