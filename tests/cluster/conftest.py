"""`pytest tests/cluster`, which is `make cluster`: not a part of `pytest`. Skipped with the reason where there can be no hosts."""

import pytest
from hosts import PROGRAMS, SLURM, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent.name == "cluster"]
    reason, of_slurm = (missing(), missing(PROGRAMS | SLURM)) if here else ("", "")
    for item in here:
        if why := of_slurm if "slurm" in item.path.name else reason:
            item.add_marker(pytest.mark.skip(reason=why))
