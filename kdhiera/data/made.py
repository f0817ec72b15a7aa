"""A small video made on the spot, to try decoders with."""

from __future__ import annotations

import io

import av
import numpy as np

LEVELS = tuple(range(20, 240, 20))
"""Grey level of every frame, from dark to bright."""


def make_video() -> bytes:
    """An H.264 MP4 file of plain frames of 64 x 64 px, one for each of `LEVELS`.

    Raises:
        av.error.FFmpegError: If FFmpeg lacks the encoder.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "threads": "1"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for level in LEVELS:
            picture = np.full((64, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
