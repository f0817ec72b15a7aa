"""Whether this machine can do the work, and a config's run in particular.

Everything is tried, not only looked up: a clip is made and decoded, Ray is started, an
object is written to the bucket.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kdhiera import __version__
from kdhiera.addresses import scheme_of
from kdhiera.config import DecodeConfig, RayConfig, RunConfig, load
from kdhiera.data.clip import Clip, ClipRequest, DecodeFailure
from kdhiera.data.made import LEVELS, make_video
from kdhiera.data.sandbox import Sandbox
from kdhiera.devices import resolve_precision
from kdhiera.errors import KdhieraError
from kdhiera.machine import num_cpus
from kdhiera.progress import counted, human_bytes
from kdhiera.stages.assemble import decode_limits
from kdhiera.stages.check_config import check_run
from kdhiera.stages.checks import Check, Checks, Verdict, attempt, fail, ok, warn
from kdhiera.stages.environment import PACKAGES, device_name, package_versions
from kdhiera.stages.ray_session import ray_session
from kdhiera.stores import open_store
from kdhiera.views import CropPolicy, FramePolicy, ViewPolicy

MAIN = ("torch", "timm", "ray", "zarr", "tensorstore", "av", "webdataset")
OPTIONAL = {  # packages that something else stands in for
    "decord": "decode.backend: decord",
    "transformers": "teachers of kind transformers: pip install 'kdhiera[teachers]'",
}
_LEAST_FREE_BYTES = 10**8
_USUAL_FREE_BYTES = 10**10
_SHM_BYTES = 10**9
_FILES = 4096  # what a cache of many columns and Ray's processes hold open
_LEAST_FILES = 512
_RAY_SECONDS = 60.0
_VARIABLES = ("AWS_", "HF_", "RAY_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR")


def examine(path: str | None = None, overrides: Sequence[str] = ()) -> Checks:
    """Check this machine and, if one is named, a run on it.

    Args:
        path: A config's YAML file.
        overrides: Dotted assignments to it.

    Raises:
        UsageError: If the config cannot be read.
    """
    config = None if path is None else load(path, overrides)
    checks = [
        *_software(),
        _variables(),
        *_devices(),
        *_decoders(),
        _ray(config.ray if config else RayConfig()),
        *_disks(config),
        _shared_memory(),
        _open_files(),
        *_bucket(config),
    ]
    if config is not None:
        checks += check_run(config)
    return Checks(checks=tuple(checks))


def _software() -> Iterator[Check]:
    python = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    yield ok("python", python)
    found = package_versions(PACKAGES)
    shown = ", ".join(f"{name} {found[name]}" for name in MAIN if name in found)
    yield ok("packages", f"kdhiera {__version__}, {shown}")
    for package in PACKAGES:
        if package not in found and package in OPTIONAL:
            yield warn(
                "packages", f"{package} is not installed; it is only for {OPTIONAL[package]}"
            )
        elif package not in found:
            yield fail("packages", f"{package} is not installed: pip install {package}")


def _devices() -> Iterator[Check]:
    cpu = torch.device("cpu")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield ok(
        "cpu",
        f"{device_name(cpu)}, {counted(num_cpus(), 'CPU')}, {human_bytes(memory)} memory; "
        f"{_multiplies(cpu)}",
    )
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        words = f"none (torch is built {built}): extraction and training run on the CPU"
        if shutil.which("nvidia-smi") is not None:
            yield warn("gpu", f"{words}, although nvidia-smi is here: check torch and the driver")
        else:
            yield ok("gpu", words)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        yield attempt(f"cuda:{index}", partial(_try_gpu, device))


def _multiplies(device: torch.device) -> str:
    fast = resolve_precision("auto", device) == torch.bfloat16
    return "precision auto is bf16" if fast else "precision auto is fp32 (no bf16 products)"


def _try_gpu(device: torch.device) -> str:
    """Multiply something there."""
    try:
        ones = torch.ones(64, 64, device=device)
        right = bool(((ones @ ones) == 64).all())
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise KdhieraError(
            f"{device_name(device)} does not compute ({str(error).splitlines()[0]}): check the "
            "driver, or that no other process holds it"
        ) from error
    if not right:
        raise KdhieraError(f"{device_name(device)} multiplies wrongly: do not use it")
    memory = f"{human_bytes(free)} of {human_bytes(total)} free"
    return f"{device_name(device)}, {memory}; {_multiplies(device)}"


def _decoders() -> Iterator[Check]:
    video = make_video()
    yield attempt("pyav", lambda: _try_decoder("pyav", video))
    check = attempt("decord", lambda: _try_decoder("decord", video))
    if check.verdict is Verdict.FAIL:
        check = warn("decord", f"{check.words} (it is only for decode.backend: decord)")
    yield check
    version = package_versions(["torchcodec"]).get("torchcodec", "not installed")
    yield ok("torchcodec", f"{version}; no backend of kdhiera uses it")


def _try_decoder(backend: str, video: bytes) -> str:
    """Decode a clip in a decoding child, and look at every frame.

    Raises:
        KdhieraError: If frames do not come, or are others.
    """
    size = 64
    policy = ViewPolicy(
        num_frames=len(LEVELS),
        height=size,
        width=size,
        frames=FramePolicy.DENSE_CENTER,
        frame_stride=1,
        crop=CropPolicy.CENTER,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        flip=False,
        allow_short=False,
        seed=0,
    )
    limits = decode_limits(DecodeConfig.model_validate({"backend": backend}))
    with Sandbox(limits, num_children=1) as sandbox:
        outcome = sandbox.submit(video, ClipRequest(uid="", view=0, policy=policy)).result()
    if isinstance(outcome, DecodeFailure):
        raise KdhieraError(f"decodes no clip of H.264 ({outcome.message}): reinstall it")
    package = "av" if backend == "pyav" else backend
    return _judge_frames(outcome, package_versions([package])[package])


def _judge_frames(clip: Clip, version: str) -> str:
    wrong = np.abs(clip.frames.mean((1, 2, 3)) - np.array(LEVELS)) > 4
    if wrong.any():
        raise KdhieraError(f"{version} decodes {wrong.sum()} of {len(LEVELS)} frames wrongly")
    return f"{version} decodes a clip of H.264, {len(LEVELS)} of {len(LEVELS)} frames right"


def _ray(config: RayConfig) -> Check:
    if not config.enabled:
        return ok("ray", "not asked for: ray.enabled is false")

    def start() -> str:
        with ray_session(config):
            import ray

            try:
                ray.get(ray.remote(_answer).remote(), timeout=_RAY_SECONDS)
            except ray.exceptions.RayError as error:
                raise KdhieraError(
                    f"Ray runs no task within {_RAY_SECONDS:.0f} s ({type(error).__name__}): free "
                    "CPUs and memory, or set ray.enabled=false"
                ) from error
            has = ray.cluster_resources()
        cpus, gpus = (f"{has.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
        return f"{config.address or 'started on this machine'}, ran a task; {cpus}, {gpus}"

    return attempt("ray", start)


def _answer() -> int:
    return os.getpid()


def _disks(config: RunConfig | None) -> Iterator[Check]:
    """Room where caches, runs and temporary files go."""
    places = {"disk": "."}
    if config is not None:
        places = {"disk of runs": config.run_dir}
        if scheme_of(config.cache.dir) != "s3:":
            places = {"disk of cache": config.cache.dir, **places}
    for name, place in {**places, "disk of TMPDIR": tempfile.gettempdir()}.items():
        folder = next(p for p in (Path(place), *Path(place).absolute().parents) if p.is_dir())
        free = shutil.disk_usage(folder).free
        words = f"{human_bytes(free)} free at {place}"
        if not os.access(folder, os.W_OK | os.X_OK):
            yield fail(name, f"{folder} may not be written to: change its owner, or choose another")
        elif free < _LEAST_FREE_BYTES:
            yield fail(name, f"only {words}: free some, or choose another disk")
        elif free < _USUAL_FREE_BYTES:
            yield warn(name, f"{words}; `extract-teachers --dry-run` says what a run needs")
        else:
            yield ok(name, words)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return ok("/dev/shm", "not there; only Ray would use it")
    free = shutil.disk_usage(folder).free
    words = f"{human_bytes(free)} free, which only Ray uses"
    if free < _SHM_BYTES:
        return warn("/dev/shm", f"{words}; Ray falls back to TMPDIR (docker: --shm-size=4g)")
    return ok("/dev/shm", words)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    words = f"a process may have {'any number' if soft == unlimited else f'{soft:,}'} open"
    way = f"ulimit -n {'65536' if hard == unlimited else min(hard, 65536)}"
    if soft != unlimited and soft < _LEAST_FILES:
        return fail("files", f"{words}, too few for Ray and a cache: {way}")
    if soft != unlimited and soft < _FILES:
        return warn("files", f"{words}; large caches want {_FILES:,}: {way}")
    return ok("files", words)


def _variables() -> Check:
    """Variables that are set, by name alone: values may be secrets."""
    names = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    return ok("variables", f"set: {', '.join(names) or 'none'}")


def _bucket(config: RunConfig | None) -> Iterator[Check]:
    """Whether the bucket of the cache takes an object."""
    if config is None or scheme_of(config.cache.dir) != "s3:":
        return

    def write() -> str:
        assert config is not None
        store = open_store(config.cache.dir)
        key = f"doctor-{uuid.uuid4().hex}"
        store.write(key, b"kdhiera")
        try:
            if store.read(key) != b"kdhiera":
                raise KdhieraError(f"{store.url} gives other bytes than were written")
        finally:
            store.delete([key])
        return f"{store.url}: an object was written, read and removed"

    yield attempt("bucket", write)
