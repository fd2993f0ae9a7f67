"""Where a flow's stage tasks run: in threads of the flow's process, or on a Dask or Ray cluster, by configuration.

Threads are right on one machine, because the stages already use all cores. Dask and Ray are for several machines.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from curation.failures import UsageError

RunnerName = Literal["threads", "dask", "ray"]
VARIABLE = "UNISH_TASK_RUNNER"
TASKS_PER_LANE = 4  # download, observe, judge and teach of different batches overlap


def make_task_runner(name: str | None, address: str | None, lanes: int) -> TaskRunner[Any]:
    """A task runner that is not started yet.

    name: threads, dask or ray; for None, the environment variable UNISH_TASK_RUNNER, or threads.
    address: a running cluster, such as tcp://HOST:8786 (Dask) or ray://HOST:10001 (Ray); None starts a local one.
    lanes: batches observed at the same time.
    Raises UsageError for an unknown name, an extra that is not installed, and an address that threads would ignore.
    """
    name = name or os.environ.get(VARIABLE) or "threads"
    if name not in ("threads", "dask", "ray"):
        raise UsageError(f"There is no task runner {name!r}; choose threads, dask or ray.")
    if name == "threads":
        if address:
            raise UsageError("A cluster address needs the task runner dask or ray; choose one or drop the address.")
        # two more lanes than observed batches: one batch is downloaded ahead, one is taught
        return ThreadPoolTaskRunner(max_workers=TASKS_PER_LANE * (lanes + 2))
    if find_spec(f"prefect_{name}") is None:
        raise UsageError(f"The task runner {name} is not installed; install it with: pip install 'unish[{name}]'")
    return _dask(address, lanes) if name == "dask" else _ray(address, lanes)


def _dask(address: str | None, lanes: int) -> TaskRunner[Any]:
    import dask
    from prefect_dask.task_runners import DaskTaskRunner

    if address:
        return DaskTaskRunner(address=address)
    # a daemonic worker cannot have children, and observing starts one process per core
    dask.config.set({"distributed.worker.daemon": False})
    return DaskTaskRunner(
        cluster_kwargs={"n_workers": lanes, "threads_per_worker": TASKS_PER_LANE, "dashboard_address": None}
    )


def _ray(address: str | None, lanes: int) -> TaskRunner[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported: it reads this once
    from prefect_ray.task_runners import RayTaskRunner

    if address:
        return RayTaskRunner(address=address)
    return RayTaskRunner(init_kwargs={"include_dashboard": False, "num_cpus": TASKS_PER_LANE * lanes})
