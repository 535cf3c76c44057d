"""Recordings made by torch's own nn.GRU, and forgers of them."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from instep.model.folder import Model, save_model, write_model
from instep.model.network import Network
from instep.model.numerics import numerics
from instep.recording.schema import HISTORY, RecordingHeader, row_crc
from instep.recording.writer import RecordingWriter

F32: TypeAlias = npt.NDArray[np.float32]
Step: TypeAlias = Callable[[F32, F32], tuple[F32, F32]]
"""x [B, features], h [L, B, H] -> y [B, outputs], h' [L, B, H]."""

START_NS = 1_700_000_000_000_000_000


def gru_description(gru: torch.nn.GRU) -> dict[str, Any]:
    return {
        "features": gru.input_size,
        "before": [],
        "gru": {
            "hidden_size": gru.hidden_size,
            "num_layers": gru.num_layers,
            "bias": gru.bias,
            "bidirectional": False,
        },
        "after": [],
    }


def make_header(description: dict[str, Any], **changes: Any) -> RecordingHeader:
    fields: dict[str, Any] = {
        "instep_version": "0.1.0",
        "created_ns": START_NS,
        "model_name": "test",
        "model_folder": "",
        "description": description,
        "model_fingerprint": "ab" * 32,
        "numerics": {"torch": torch.__version__, "threads": "1"},
        "exactness": "exact",
        "buckets": (4, 8, 16),
        "max_ulp": 0,
    }
    return RecordingHeader(**{**fields, **changes})


def make_gru(features: int = 3, hidden: int = 4, layers: int = 1, bias: bool = True, seed: int = 0) -> torch.nn.GRU:
    torch.manual_seed(seed)
    return torch.nn.GRU(features, hidden, num_layers=layers, bias=bias)


def gru_step(gru: torch.nn.GRU) -> Step:
    """One timestep of torch's own nn.GRU."""

    def step(x: F32, h: F32) -> tuple[F32, F32]:
        with torch.inference_mode():
            y, after = gru(torch.from_numpy(x)[None], torch.from_numpy(h))
        return y[0].numpy(), after.numpy()

    return step


@dataclass(frozen=True)
class Recorded:
    """A recording and the model it was made with."""

    path: Path
    folder: Path
    header: RecordingHeader


def record_gru(
    where: Path, gru: torch.nn.GRU, lengths: Sequence[int], *, changes: dict[str, Any] | None = None, **how: Any
) -> Recorded:
    """Record torch's own nn.GRU (`how` as in `record`); the model folder lies beside the recording."""
    model = save_model(where / "model", gru)
    return _record(where, model, gru_step(gru), lengths, {"buckets": (4, 8, 16), **(changes or {})}, how)


def record_model(
    where: Path, model: Model, lengths: Sequence[int], *, changes: dict[str, Any] | None = None, **how: Any
) -> Recorded:
    """Record a model with dense layers as it is served: its bits are those of the padded network."""
    write_model(where / "model", model)
    network = Network(model, torch.device("cpu"))

    def step(x: F32, h: F32) -> tuple[F32, F32]:
        frames = np.zeros((len(x), network.input_width), np.float32)
        frames[:, : x.shape[1]] = x
        states = np.zeros((*h.shape[:2], network.state_width), np.float32)
        states[:, :, : h.shape[2]] = h
        with torch.inference_mode():
            y, after = network.step(torch.from_numpy(frames), torch.from_numpy(states))
        return y[:, : network.outputs].numpy(), after[:, :, : network.state_size].numpy()

    how = {"bucket": 32, **how}
    return _record(where, model, step, lengths, {"buckets": (32, 64), **(changes or {})}, how)


def _record(
    where: Path, model: Model, step: Step, lengths: Sequence[int], changes: dict[str, Any], how: dict[str, Any]
) -> Recorded:
    fields: dict[str, Any] = {
        "model_name": model.name,
        "model_folder": str(where / "model"),
        "model_fingerprint": model.fingerprint,
        "numerics": {**numerics(Network(model, torch.device("cpu"))), "threads": "1"},
        **changes,
    }
    header = make_header(model.description.model_dump(mode="json"), **fields)
    record(where / "a.rec", header, step, lengths, **how)
    return Recorded(where / "a.rec", where / "model", header)


def record(
    path: Path,
    header: RecordingHeader,
    step: Step,
    lengths: Sequence[int],
    *,
    bucket: int = 8,
    seed: int = 0,
    initial: Sequence[int] = (),
    leave_open: Sequence[int] = (),
    mix_up: tuple[int, int, int] | None = None,
    magnitude: float = 1.0,
    finish: bool = True,
) -> RecordingWriter:
    """Record streams of these lengths, several at a time in random company, as an engine would.

    Args:
        path: the new file.
        header: of the recording.
        step: what computes.
        lengths: frames of each stream; stream numbers count from 1 in this order.
        bucket: rows of every step, padded with zeros.
        seed: of the frames and of who is in which batch.
        initial: indices of streams that start from a random state.
        leave_open: indices of streams that are not closed.
        mix_up: (a, b, seq): stream a goes on from the state of b before its frame `seq`, as in an engine that is wrong.
        magnitude: of the frames.
        finish: close the recording; otherwise the writer still has it open, everything committed.
    """
    rng = np.random.default_rng(seed)
    writer = RecordingWriter.create(path, header)
    layers, size = header.state_layers, header.state_size
    states = np.zeros((len(lengths), layers, size), np.float32)
    for at in range(len(lengths)):
        if at in initial:
            states[at] = rng.uniform(-1, 1, (layers, size))
        writer.open_stream(at + 1, f"stream-{at + 1}", START_NS + at, states[at] if at in initial else None)
    done = np.zeros(len(lengths), np.int64)
    now = START_NS
    while len(pending := np.flatnonzero(done < np.asarray(lengths))):
        chosen = rng.permutation(pending)[: rng.integers(1, bucket + 1)]
        x = np.zeros((bucket, header.features), np.float32)
        x[: len(chosen)] = magnitude * rng.standard_normal((len(chosen), header.features))
        if mix_up is not None and mix_up[0] in chosen and done[mix_up[0]] == mix_up[2]:
            states[mix_up[0]] = states[mix_up[1]]
        h = np.zeros((layers, bucket, size), np.float32)
        h[:, : len(chosen)] = states[chosen].transpose(1, 0, 2)
        y, after = step(x, h)
        states[chosen] = after[:, : len(chosen)].transpose(1, 0, 2)
        rows = slice(0, len(chosen))
        now += 1000
        writer.add_batch(now, bucket, (chosen + 1).astype(np.uint32), done[chosen].astype(np.uint64), x[rows], y[rows])
        done[chosen] += 1
    for at, length in enumerate(lengths):
        if at not in leave_open:
            writer.close_stream(at + 1, now + at, "closed by its client", length, states[at])
    writer.commit()
    if finish:
        writer.close()
    return writer


class Forger:
    """Changes rows of a copy of a recording, with their CRC recomputed or left as it was."""

    def __init__(self, source: Path, target: Path, *, fix_crc: bool = True) -> None:
        shutil.copyfile(source, target)
        self.path = target
        self.fix_crc = fix_crc

    def rows(self, table: str) -> list[dict[str, Any]]:
        with sqlite3.connect(self.path) as database:
            database.row_factory = sqlite3.Row
            rows = [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY position")]
        database.close()
        return rows

    def change(self, table: str, position: int, **columns: Any) -> None:
        self._change(table, position, columns)

    def move(self, table: str, position: int, to: int) -> None:
        self._change(table, position, {"position": to})

    def remove(self, table: str, position: int) -> None:
        self._run(f"DELETE FROM {table} WHERE position = ?", (position,))

    def change_header(self, key: str, value: str) -> None:
        crc = {"crc": row_crc(key, value)} if self.fix_crc else {}
        assignments = ", ".join(f"{name} = :{name}" for name in ("value", *crc))
        self._run(f"UPDATE header SET {assignments} WHERE key = :key", {"key": key, "value": value, **crc})

    def find_frame(self, stream: int, seq: int) -> tuple[dict[str, Any], int]:
        """The batch that holds a frame, and the frame's row in it."""
        for row in self.rows("batches"):
            numbers = np.frombuffer(row["streams"], "<u4")
            seqs = np.frombuffer(row["seqs"], "<u8")
            at = np.flatnonzero((numbers == stream) & (seqs == seq))
            if len(at):
                return row, int(at[0])
        raise LookupError((stream, seq))

    def column(self, batch: dict[str, Any], name: str) -> npt.NDArray[Any]:
        """A writable copy of a batch's column, one row a frame."""
        kind = {"streams": "<u4", "seqs": "<u8", "x": "<f4", "y": "<f4"}[name]
        shape = (batch["size"],) if name in ("streams", "seqs") else (batch["size"], -1)
        return np.frombuffer(batch[name], kind).reshape(shape).copy()

    def _change(self, table: str, position: int, columns: dict[str, Any]) -> None:
        (row,) = (row for row in self.rows(table) if row["position"] == position)
        row.update(columns)
        if self.fix_crc:
            row["crc"] = row_crc(*(row[name] for name in HISTORY[table]))
        assignments = ", ".join(f"{name} = :{name}" for name in row)
        self._run(f"UPDATE {table} SET {assignments} WHERE position = :was", {**row, "was": position})

    def _run(self, statement: str, values: Any) -> None:
        with sqlite3.connect(self.path) as database:
            assert database.execute(statement, values).rowcount == 1
        database.close()
