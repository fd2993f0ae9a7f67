"""The same two hundred clips through Dask and through Ray, with a real PostgreSQL and a real S3 server between."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import sqlalchemy as sa

from curation import pipeline
from curation.catalog import Catalog
from curation.manifest import write_manifest
from curation.records import ClipRef
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings
from curation.shards.remote import pull
from curation.shards.verify import verify
from tests.support.databases import postgres_server
from tests.support.objects import s3_server
from tests.support.prefect_place import Place

pytestmark = pytest.mark.slow
CLIPS = 200


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, small_clips: Path, seer: Path, tolerant: Path) -> Settings:
    """Two hundred files of five kinds and their manifest, and what one undisturbed process makes of them."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "videos").mkdir()
    for number in range(CLIPS):
        source = ("bars", "cut", "set", "count", "broken")[number % 5]
        shutil.copyfile(small_clips / f"{source}.mp4", folder / "videos" / f"{number:03}.mp4")
    refs = [ClipRef("local", f"{number:03}.mp4") for number in range(CLIPS)]
    write_manifest(refs, folder / "m.csv")
    settings = Settings(
        out=folder / "alone", policy=tolerant, batch_clips=20,
        observe=ObserveSettings(detector=str(seer), detector_long_side=192, frame_long_side=126),
        teacher=TeacherSettings(kind="none"), download=DownloadSettings(local_root=folder / "videos"),
    )  # fmt: skip
    pipeline.run(settings, refs)
    return settings


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[str, str]]:
    """URLs of a PostgreSQL server and of a bucket."""
    with pytest.MonkeyPatch.context() as patch, postgres_server() as database, s3_server(patch) as bucket:
        yield database, bucket


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_cluster_gives_what_one_process_gives(
    service: Place, lab: Settings, shared: tuple[str, str], runner: str, tmp_path: Path
):
    from flows.curate import curate

    if find_spec(f"prefect_{runner}") is None:
        pytest.skip(f"the extra `{runner}` is not installed")
    database, bucket = shared
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {runner}")
    engine.dispose()
    settings = lab.model_copy(
        update={
            "out": tmp_path / "out",
            "catalog_url": f"{database}?options=-csearch_path%3D{runner}",
            "storage": f"{bucket}/{runner}",
        }
    )
    state = curate(
        manifest=lab.out.parent / "m.csv", out=settings.out, policy=lab.policy, detector=lab.observe.detector,
        teacher="none", detector_long_side=192, frame_long_side=126, local_root=lab.download.local_root,
        catalog_url=settings.catalog_url, storage=settings.storage, batch_clips=20, workers=1, parallel_batches=2,
        task_runner=runner, return_state=True,
    )  # fmt: skip
    assert state.is_completed(), state.message
    refs = [ClipRef("local", f"{number:03}.mp4") for number in range(CLIPS)]
    found, expected = pipeline.funnel(settings, refs), pipeline.funnel(lab, refs)
    assert found.table() == expected.table() and found.sharded == 120
    shards = pull(found.folder, tmp_path / "pulled")
    assert {s.file: s.sha256 for s in shards} == {s.file: s.sha256 for s in verify(Path(expected.folder))}
    assert Catalog(settings.database).leases() == []
