"""Which store a process keeps its logs in, by its command line: `--log segments` (the default) or `--log kafka`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from citybrain.errors import UsageError
from citybrain.layout import Layout
from citybrain.segments import SEGMENT_BYTES
from streams.logs import LogStore, SegmentStore

NO_ADDRESS = "--log kafka: say where it is, with --kafka HOST:PORT"


class Place(NamedTuple):
    """A data folder, and where its logs are."""

    layout: Layout
    logs: LogStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--log`, `--kafka` and `--topics`."""
    parser.add_argument(
        "--log", choices=("segments", "kafka"), default="segments", help="where the logs are kept (default: segments)"
    )
    parser.add_argument("--kafka", metavar="HOST:PORT", help="with --log kafka: its brokers, several with commas")
    parser.add_argument(
        "--kafka-config", metavar="FILE", type=Path, help="... and how to get in: TLS, passwords (YAML)"
    )
    parser.add_argument("--topics", metavar="PREFIX", default="citybrain.", help="what its topics begin with")


def words_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the options again, for another process; raises UsageError."""
    if args.log == "segments":
        return ()
    if not args.kafka:
        raise UsageError(NO_ADDRESS)
    config = () if args.kafka_config is None else ("--kafka-config", str(args.kafka_config.resolve()))
    return ("--log", "kafka", "--kafka", args.kafka, "--topics", args.topics, *config)


def open_place(args: argparse.Namespace, layout: Layout, shards: int, segment_bytes: int = SEGMENT_BYTES) -> Place:
    """Return the data folder and the store that the command line names; raises UsageError, Unavailable, ConfigError."""
    if args.log == "segments":
        return Place(layout, SegmentStore(layout, segment_bytes=segment_bytes))
    if not args.kafka:
        raise UsageError(NO_ADDRESS)
    # Only here, so that the embedded runtime needs no Kafka client.
    from streams.runtimes.kafka.access import read_access  # noqa: PLC0415
    from streams.runtimes.kafka.blobs import SharedLayout  # noqa: PLC0415
    from streams.runtimes.kafka.store import KafkaStore  # noqa: PLC0415

    access = read_access(args.kafka_config) if args.kafka_config is not None else None
    store = KafkaStore(args.kafka, layout, shards, prefix=args.topics, settings=access)
    store.open()
    return Place(SharedLayout(layout.root, layout.store, store.blobs), store)
