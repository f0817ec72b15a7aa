"""Ray for the length of a block: a cluster, or this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kdhiera.config import RayConfig
from kdhiera.errors import UsageError
from kdhiera.machine import num_cpus


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Join the cluster, or start Ray on this machine without a dashboard.

    Ray that runs already in this process is used and left running.

    Raises:
        UsageError: If the cluster cannot be reached.
    """
    _set_environment(config)
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        _connect(config)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def _set_environment(config: RayConfig) -> None:
    """What Ray reads when it is imported: a token for every caller, no usage reports."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.address is None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect(config: RayConfig) -> None:
    """Start or join; `ray.init` replaces the handlers of SIGTERM: ours come back."""
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "configure_logging": False}
    in_main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)} if in_main else {}
    try:
        if config.address is not None:
            ray.init(address=config.address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, num_cpus=num_cpus(), **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UsageError(
            f"Ray at {config.address or 'this machine'} cannot be reached ({reason}): correct "
            "ray.address, export the cluster's RAY_AUTH_TOKEN (or RAY_AUTH_MODE=disabled where it "
            "has none), or set ray.enabled=false"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
