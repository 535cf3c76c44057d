"""Forging recordings: rows changed behind the writer's back."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instep.recording.schema import TABLES, row_crc

_KINDS = {"streams": "<u4", "seqs": "<u8", "x": "<f4", "y": "<f4"}


class Forger:
    """Changes rows of a copy of a recording, with their CRC recomputed or left as it was."""

    def __init__(self, source: Path, target: Path, *, fix_crc: bool = True) -> None:
        shutil.copyfile(source, target)
        self.path = target
        self.fix_crc = fix_crc

    def rows(self, table: str) -> list[dict[str, Any]]:
        with sqlite3.connect(self.path) as database:
            database.row_factory = sqlite3.Row
            rows = [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY 1")]
        database.close()
        return rows

    def change(self, table: str, *key: int, **columns: Any) -> None:
        """Change the only row with these first values of its key."""
        self._change(table, key, columns)

    def change_state(self, stream: int, position: int, **columns: Any) -> None:
        """A state of a stream that has several, by the checkpoint that wrote it."""
        (row,) = (row for row in self.rows("states") if (row["stream"], row["position"]) == (stream, position))
        row.update(columns)
        if self.fix_crc:
            row["crc"] = row_crc(*(row[name] for name in TABLES["states"]))
        assignments = ", ".join(f"{name} = :{name}" for name in row)
        self._run(f"UPDATE states SET {assignments} WHERE stream = :stream AND position = :position", row)

    def move(self, table: str, position: int, to: int) -> None:
        self._change(table, (position,), {"position": to})

    def remove(self, table: str, *key: int | str) -> None:
        """Remove the only row with these first values of its key."""
        where = " AND ".join(f"{name} = ?" for name in key_of(table)[: len(key)])
        self._run(f"DELETE FROM {table} WHERE {where}", key)

    def change_header(self, key: str, value: str) -> None:
        crc = {"crc": row_crc(key, value)} if self.fix_crc else {}
        assignments = ", ".join(f"{name} = :{name}" for name in ("value", *crc))
        self._run(f"UPDATE header SET {assignments} WHERE key = :key", {"key": key, "value": value, **crc})

    def find_frame(self, stream: int, seq: int) -> tuple[dict[str, Any], int]:
        """The batch that holds a frame, with its y and the position of that, `outputs`; and the frame's row in it."""
        for row in self.rows("batches"):
            numbers = np.frombuffer(row["streams"], "<u4")
            seqs = np.frombuffer(row["seqs"], "<u8")
            at = np.flatnonzero((numbers == stream) & (seqs == seq))
            if len(at):
                (outputs,) = (each for each in self.rows("outputs") if each["batch"] == row["position"])
                return {**row, "y": outputs["y"], "outputs": outputs["position"]}, int(at[0])
        raise LookupError((stream, seq))

    def column(self, batch: dict[str, Any], name: str) -> npt.NDArray[Any]:
        """A writable copy of a batch's column, one row a frame."""
        shape = (batch["size"],) if name in ("streams", "seqs") else (batch["size"], -1)
        return np.frombuffer(batch[name], _KINDS[name]).reshape(shape).copy()

    def change_batch(self, batch: dict[str, Any], **columns: npt.NDArray[Any]) -> None:
        """Put columns back into a batch that was found, and into its outputs."""
        found = {name: column.tobytes() for name, column in columns.items()}
        if "y" in found:
            self.change("outputs", batch["outputs"], y=found.pop("y"))
        if found:
            (size,) = {len(columns[name]) for name in found}
            self.change("batches", batch["position"], size=size, **found)

    def _change(self, table: str, key: tuple[int, ...], columns: dict[str, Any]) -> None:
        names = key_of(table)[: len(key)]
        (row,) = (row for row in self.rows(table) if tuple(row[name] for name in names) == key)
        row.update(columns)
        if self.fix_crc:
            row["crc"] = row_crc(*(row[name] for name in TABLES[table]))
        assignments = ", ".join(f"{name} = :{name}" for name in row)
        where = " AND ".join(f"{name} = :was_{name}" for name in names)
        was = {f"was_{name}": value for name, value in zip(names, key, strict=True)}
        self._run(f"UPDATE {table} SET {assignments} WHERE {where}", {**row, **was})

    def _run(self, statement: str, values: Any) -> None:
        with sqlite3.connect(self.path) as database:
            assert database.execute(statement, values).rowcount == 1
        database.close()


def key_of(table: str) -> tuple[str, ...]:
    """The columns that name a row."""
    named = {"header": ("key",)}
    return named.get(table) or (next(iter(TABLES[table])),)
