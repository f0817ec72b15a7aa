"""Samples through the decode children: in order, a bounded number ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from kdhiera.data.clip import Clip, ClipRequest, DecodeFailure
from kdhiera.data.sandbox import Sandbox
from kdhiera.data.shards import Sample


def decode_samples(
    sandbox: Sandbox, wanted: Iterable[tuple[Sample, ClipRequest]], *, in_flight: int
) -> Iterator[tuple[Sample, Clip | DecodeFailure]]:
    """Decode in the children, a bounded number of clips ahead, in the order asked for.

    Args:
        sandbox: Decoding children.
        wanted: Samples and what to decode of them; one without its video fails as it is.
        in_flight: Clips ahead, at least 1.
    """
    ahead: deque[tuple[Sample, Future[Clip | DecodeFailure]]] = deque()
    try:
        for sample, request in wanted:
            if sample.video is None:
                outcome: Future[Clip | DecodeFailure] = Future()
                outcome.set_result(DecodeFailure(status=sample.status, message=sample.message))
            else:
                outcome = sandbox.submit(sample.video, request)
            ahead.append((sample, outcome))
            if len(ahead) >= in_flight:
                first, result = ahead.popleft()
                yield first, result.result()
        while ahead:
            first, result = ahead.popleft()
            yield first, result.result()
    finally:
        for _, result in ahead:
            result.cancel()
