"""Reads the `.wandb` file that an offline run leaves; wandb itself no longer ships a reader.

The file is a log in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB. A record lies in
one chunk, or in several where it meets a block's end; a chunk is a checksum (4 bytes), a length
(2), a type (1: whole, 2: first, 3: middle, 4: last) and that many bytes. A block's last 6 bytes or
fewer hold nothing.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2 as proto

HEADER, BLOCK, CHUNK = 7, 32 * 1024, struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a file, in their order."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = HEADER, b""
    while position + CHUNK.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(data, position)
        position += CHUNK.size
        content = data[position : position + length]
        assert zlib.crc32(bytes([kind]) + content) == checksum
        position += length
        record += content
        if kind in (WHOLE, LAST):
            message = proto.Record()
            message.ParseFromString(record)
            yield message
            record = b""


@dataclass
class OfflineRun:
    """What an offline run would send."""

    path: Path
    id: str = ""
    group: str = ""
    job_type: str = ""
    tags: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)  # name, or with a * -> its definition
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)  # type -> record
    exit_code: int | None = None  # None: never finished

    @classmethod
    def read(cls, folder: Path) -> "OfflineRun":
        """The one run that is kept in a run's output folder; it has to be finished."""
        assert wandb.run is None
        wandb.teardown()  # the service writes the last records when it likes, at its end at latest
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        found = cls(path)
        for record in records(path):
            found.add(record)
        return found

    def add(self, record: Any) -> None:
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                self.id, self.group, self.job_type = run.run_id, run.run_group, run.job_type
                self.tags = set(run.tags)
            case "config":
                self.config |= values(record.config.update)
            case "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            case "history":
                self.history.append(values(record.history.item))
            case "summary":
                self.summary |= values(record.summary.update)
            case "artifact":
                self.artifacts[record.artifact.type] = record.artifact
            case "exit":
                self.exit_code = record.exit.exit_code

    @property
    def logged(self) -> set[str]:
        """Names of all numbers and pictures."""
        return {name for row in self.history for name in row}

    def series(self, name: str) -> list[tuple[int, Any]]:
        """(epoch, value) of a metric."""
        return [(row["epoch"], row[name]) for row in self.history if name in row]

    def pictures(self, name: str) -> list[Path]:
        """The files of a picture, an epoch each."""
        files = self.path.parent / "files"
        return [files / image["path"] for _, image in self.series(name)]


def values(items: Any) -> dict[str, Any]:
    """Items with a key, or the path of a nested one, and a value in JSON."""
    found: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(item.value_json)
    return found
