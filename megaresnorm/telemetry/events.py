"""Files that grow by whole records, and TensorBoard's files made of them. A full disk delays them."""

import io
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megaresnorm.files import open_plain

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 60.0
_EVENTS = re.compile(r"events\.out\.tfevents\.([0-9]+)")


class Appended:
    """A file that grows by whole records. What cannot be written now is kept, and written when it can be.

    Args:
        new: whether the file must not exist yet.

    Raises:
        OSError: it cannot be opened, or is not a plain file.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self._path, self._waiting, self._next_warning = path, bytearray(), 0.0
        self._descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if new else 0))
        self._size = os.lseek(self._descriptor, 0, os.SEEK_END)

    def write(self, record: bytes = b"") -> None:
        """Append a record, after those that are still waiting. A failure is a warning, at most one a minute."""
        self._waiting += record
        done = 0
        try:
            while done < len(self._waiting):
                done += os.pwrite(self._descriptor, memoryview(self._waiting)[done:], self._size + done)
        except OSError as e:
            self._take_back()
            if time.monotonic() >= self._next_warning:
                self._next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
                log.warning(
                    "warning: %s: cannot be written (%s); training goes on, the rest follows", self._path, e.strerror
                )
            return
        self._size += done
        self._waiting.clear()

    def amend(self, last: bytes, record: bytes) -> None:
        """Put a record in the place of the last one, which it must be longer than."""
        if self._waiting:
            del self._waiting[-len(last) :]
        else:
            self._size -= len(last)
        self.write(record)

    def close(self) -> None:
        """Close the file. What cannot be written even now is lost, with a warning."""
        self._next_warning = 0.0
        self.write()
        os.close(self._descriptor)

    def _take_back(self) -> None:
        """Remove half a record, so that nobody reads it; should this fail as well, it is overwritten later."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as e:
            log.debug("%s: cannot be cut (%s)", self._path, e.strerror)


class EventFile:
    """Scalars as TensorBoard reads them. Its own writer has a thread that a full disk ends for good, with a traceback.

    Args:
        folder: made where it is missing.
        first_step: from which on what earlier files hold is void, counted from 1.
        settings: the recipe's, by dotted key, shown as a table on the page of texts.
    """

    def __init__(self, folder: Path, first_step: int, settings: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        stamp = stamp_after(os.listdir(folder), time.time_ns())
        name = f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(folder / name, new=True)
        self._append(file_version="brain.Event:2")
        self.go_back(first_step)
        if settings:
            cells = {key: str(value).replace("|", "\\|").replace("`", "'") for key, value in settings.items()}
            rows = [f"| `{key}` | `{value}` |" for key, value in cells.items()]
            self._write_text("recipe", "\n".join(["| setting | value |", "| --- | --- |", *rows]), first_step - 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the scalars of one step, counted from 1, by their tags."""
        self._append(step=step, summary={"value": [{"tag": n, "simple_value": v} for n, v in metrics.items()]})

    def go_back(self, first_step: int) -> None:
        """What was written from this step on, here or in earlier files, is void."""
        self._append(step=first_step, session_log={"status": 1})  # START

    def write_image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Record an image.

        Args:
            pixels: [height, width, 3] of 8 bits.
        """
        from PIL import Image  # which TensorBoard needs as well

        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        height, width, _ = pixels.shape
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png.getvalue()}
        self._append(step=step, summary={"value": [{"tag": tag, "image": image}]})

    def close(self, code: int = 0) -> None:
        """Close the file, as ``Appended.close``."""
        self._file.close()

    def _write_text(self, tag: str, text: str, step: int) -> None:
        """Record a text in Markdown."""
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        metadata = {"plugin_data": {"plugin_name": "text"}}
        self._append(step=step, summary={"value": [{"tag": tag, "metadata": metadata, "tensor": tensor}]})

    def _append(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.write(record.getvalue())


def stamp_after(names: list[str], now: int) -> str:
    """Digits by which an event file sorts after those of ``names``: the time, unless the clock has gone back since.

    TensorBoard reads the files of a folder in the order of their names, and skips what sorts before what it has read.

    >>> stamp_after(["events.out.tfevents.150.host.7"], 200), stamp_after(["events.out.tfevents.250.host.7"], 200)
    ('200', '251')
    """
    stamps = [match[1] for match in map(_EVENTS.match, names) if match is not None]
    newest = max(stamps, default="")
    if str(now) > newest:
        return str(now)
    following = str(int(newest) + 1)
    return following if following > newest else f"{newest}0"  # 9 is followed by 90, since 10 sorts before it
