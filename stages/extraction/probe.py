"""Going on with a cache under other library versions: allowed if the same bytes come out.

Versions are recorded, not part of an identity: most upgrades change nothing. Before rows
made by other versions join a cache, some stored ones are made again and compared.
"""

from __future__ import annotations

import logging

from kdhiera.cache.commit import Cache
from kdhiera.cache.records import Versions
from kdhiera.config import RunConfig
from kdhiera.errors import KdhieraError, MismatchError
from kdhiera.stages.assemble import columns_of, versions
from kdhiera.stages.replaying.replay import NoSourceError, replay_rows

logger = logging.getLogger(__name__)


def probe_versions(config: RunConfig, cache: Cache, *, num_rows: int) -> None:
    """Replay stored rows and refuse to go on if they come out differently.

    Args:
        config: The run; precisions are resolved.
        cache: Its cache, with something committed.
        num_rows: Rows to replay.

    Raises:
        MismatchError: If pixels differ, or features and scores by more than their bounds.
        KdhieraError: If no stored row's source can be read.
    """
    commits = list(cache.commits().values())
    columns = {c: k for c, k in columns_of(config).items() if any(c in p.columns for p in commits)}
    try:
        replayed = replay_rows(config, cache, num_rows=num_rows, columns=columns)
    except NoSourceError as error:
        raise KdhieraError(
            f"{error}, or set extract.probe_rows=0 to go on without a comparison"
        ) from None
    changes = _changes({part.base.versions for part in commits})
    problems = replayed.beyond
    if problems:
        raise MismatchError(
            f"the cache in {cache.url} was made with other library versions "
            f"({changes}), and with those installed now its rows do not come out the "
            f"same: {'; '.join(problems)}. Install the versions it was made with, or set cache.dir "
            "to another folder"
        )
    logger.info(
        "other library versions (%s) give the stored rows: %s",
        changes,
        replayed.describe(),
    )


def _changes(made_by: set[Versions]) -> str:
    """Packages whose version is none of those that made the cache."""
    known: dict[str, set[str]] = {}
    for made in made_by:
        for package, version in made:
            known.setdefault(package, set()).add(version)
    changed = [
        f"{package} {' or '.join(sorted(known.get(package, {'none'})))}, now {version}"
        for package, version in versions()
        if version not in known.get(package, set())
    ]
    return "; ".join(changed) or "a new combination of them"
