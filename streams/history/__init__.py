"""The history: what the log holds, as Parquet, for charts, exports and backtests (docs/history.md)."""

from streams.history.replay import frames

__all__ = ["frames"]
