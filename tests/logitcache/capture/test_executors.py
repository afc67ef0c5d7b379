"""Many engines on one build: Ray actors, shard ranges, an object store; always the cache of a single process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import logitcache
from logitcache import SparseTargets, UserError
from logitcache.assembly import ray_actors
from logitcache.assembly.workspace import lock_range
from logitcache.capture import executors
from logitcache.capture.finish import finish
from logitcache.capture.plan import BuildPlan
from logitcache.storage.folder import Folder
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401
from tests.helpers.processes import run_command
from tests.helpers.underway import num_finished_shards

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.engine

SETTINGS: dict[str, Any] = {
    "backend": "transformers",
    "top_k": 16,
    "precision": "exact",
    "tail_groups": 4,
    "tail_samples": 2,
    "tail_rank": 4,
    "shard_positions": 150,
}


def build(teacher: Path, corpus: Path, out: str | Path, **settings: Any) -> Any:
    return logitcache.build(str(teacher), str(corpus), out, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def whole(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> logitcache.LogitCache:
    """Built by one process in one go."""
    cache: logitcache.LogitCache = build(teacher, corpus, tmp_path_factory.mktemp("whole") / "cache")
    return cache


def assert_same(ours: logitcache.LogitCache, whole: logitcache.LogitCache) -> None:
    assert ours.manifest.fingerprint == whole.manifest.fingerprint
    assert [s.name for s in ours.manifest.shards] == [s.name for s in whole.manifest.shards]
    assert ours.tail_groups is not None and whole.tail_groups is not None
    assert np.array_equal(ours.tail_groups, whole.tail_groups)
    assert ours.tail_basis is not None and whole.tail_basis is not None
    for a, b in zip(ours, whole, strict=True):
        assert a.row_id == b.row_id
        assert np.array_equal(a.targets.token_ids, b.targets.token_ids)
        assert a.targets.sample_ids is not None and b.targets.sample_ids is not None
        assert np.array_equal(a.targets.sample_ids, b.targets.sample_ids)
        assert np.allclose(a.targets.logprobs, b.targets.logprobs, atol=1e-4)
        assert np.allclose(rebuilt(ours, a.targets), rebuilt(whole, b.targets), atol=0.01)
        assert np.allclose(np.exp(a.targets.tail_logprob), np.exp(b.targets.tail_logprob), atol=1e-6)


def rebuilt(cache: logitcache.LogitCache, targets: SparseTargets) -> np.ndarray:
    """The logits but for a shift, up to the basis' rounding to half precision."""
    assert cache.tail_basis is not None and targets.tail_coefficients is not None
    logits = cache.tail_basis.offset + targets.tail_coefficients @ cache.tail_basis.directions.T
    return np.asarray(logits - logits.mean(axis=1, keepdims=True))


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ShardWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def after_shards(out: Path, count: int, do: Any) -> threading.Thread:
    """Does something once `count` shards of a build are recorded."""

    def run() -> None:
        while num_finished_shards(out) < count:
            time.sleep(0.001)
        do()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_two_engines_one_of_whom_is_killed_make_the_cache_of_one_process(
    cluster: None,
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    whole: logitcache.LogitCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "c"
    killer = after_shards(out, 2, lambda: actors()[0].kill())
    assert_same(build(teacher, corpus, out, executor="ray", engines=2), whole)
    killer.join()
    assert "an engine was lost" in caplog.text


def test_when_all_actors_are_lost_the_finished_shards_are_kept_and_the_same_build_continues(
    cluster: None, teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache
) -> None:
    out = tmp_path / "c"
    after_shards(out, 2, lambda: [actor.kill() for actor in actors()])
    with pytest.raises(UserError, match=r"all engines were lost; .* The finished shards are kept"):
        build(teacher, corpus, out, executor="ray", engines=1)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("data/*.parquet")}
    assert len(kept) >= 2
    assert_same(build(teacher, corpus, out), whole)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


def test_a_teacher_that_does_not_load_in_an_actor_is_one_line(
    cluster: None, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "teacher"
    broken.mkdir()
    for path in teacher.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="its weights do not load"):
        build(broken, corpus, tmp_path / "c", executor="ray", engines=1)


def test_more_engines_than_the_cluster_holds_are_refused(
    cluster: None, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--engines 3: the Ray cluster has no GPU and 2 core\(s\); choose at most 2"):
        build(teacher, corpus, tmp_path / "c", executor="ray", engines=3)


@pytest.mark.parametrize(
    ("resource", "hosts", "wanted", "each", "expected"),
    [
        ("CPU", [4], None, 1, (1, 4)),
        ("CPU", [4, 4], None, 1, (1, 4)),
        ("CPU", [2, 6], 2, 1, (2, 3)),
        ("CPU", [0, 1, 1], 2, 1, (2, 1)),
        ("GPU", [3, 3], None, 2, (2, 2)),
        ("GPU", [1, 8], None, 1, (9, 1)),
    ],
)
def test_what_an_engine_holds_is_on_one_host(
    resource: str, hosts: list[int], wanted: int | None, each: int, expected: tuple[int, int]
) -> None:
    job: Any = SimpleNamespace(engine=SimpleNamespace(options={"tensor_parallel_size": each}))
    number, held = executors._resources(job, wanted, [{resource: float(count)} for count in hosts])
    assert (number, held[f"num_{resource.lower()}s"]) == expected


def test_a_tensor_parallel_group_that_no_host_holds_is_refused() -> None:
    job: Any = SimpleNamespace(engine=SimpleNamespace(options={"tensor_parallel_size": 2}))
    with pytest.raises(UserError, match=r"with 2 GPU\(s\) each, of one host, .* it has room for 0"):
        executors._resources(job, None, [{"GPU": 1.0}, {"GPU": 1.0}])


def test_engines_that_find_no_room_are_told_of(
    cluster: None,
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @ray.remote(num_cpus=2)
    class Other:
        pass

    other: Any = Other.remote()  # type: ignore[attr-defined]
    ray.get(other.__ray_ready__.remote())
    monkeypatch.setattr(ray_actors, "STARTED_S", 0.1)
    building = threading.Thread(
        target=build, args=(teacher, corpus, tmp_path / "c"), kwargs={"executor": "ray", "engines": 1}
    )
    building.start()
    while "1 engine(s) wait for room in the Ray cluster" not in caplog.text:
        time.sleep(0.05)
        assert building.is_alive()
    ray.kill(other)
    building.join()
    assert logitcache.open(tmp_path / "c").num_positions


def test_a_cluster_that_does_not_answer_is_named(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    run = run_command(
        *("logitcache", "build", "--teacher", str(teacher), "--data", str(corpus), "--out", str(tmp_path / "c")),
        *("--backend", "transformers", "--executor", "ray", "--ray-address", "127.0.0.1:1"),
    )
    assert run.returncode == 2
    [line] = [line for line in run.stderr.splitlines() if "error" in line]
    assert line.startswith("logitcache: error: --ray-address 127.0.0.1:1: no Ray cluster answers there")


def test_ray_that_is_not_installed_is_named(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.assembly.placement.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'logitcache\[ray\]'"):
        build(teacher, corpus, tmp_path / "c", executor="ray")


def test_a_killed_driver_leaves_its_shards_to_the_same_command(
    teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache
) -> None:
    out = tmp_path / "c"
    script = (
        "import sys, ray, logitcache\n"
        "ray.init(address='local', num_cpus=1, log_to_driver=False)\n"
        f"logitcache.build(*sys.argv[1:4], executor='ray', engines=1, **{SETTINGS!r})"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, teacher, corpus, out], stderr=subprocess.DEVNULL)
    after_shards(out, 2, lambda: os.kill(driver.pid, signal.SIGKILL)).join(timeout=120)
    assert driver.wait(timeout=60) == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors(), "the engines outlived the driver"
    assert_same(build(teacher, corpus, out), whole)


def test_shard_ranges_share_a_folder_and_finish_makes_the_cache(
    teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache
) -> None:
    out = tmp_path / "c"
    assert build(teacher, corpus, out, shard_range=(0, 3)) is None
    assert build(teacher, corpus, out, shard_range=(2, 3)) is None
    with pytest.raises(UserError, match=r"shards are not complete \(1, 4, 7"):
        finish(out)
    with pytest.raises(UserError, match="unfinished build"):
        logitcache.open(out)
    assert build(teacher, corpus, out, shard_range=(1, 3)) is None
    assert_same(finish(out), whole)
    assert finish(out).num_positions == whole.num_positions
    assert not (out / ".build").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_second_process_of_the_same_range_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache, index: int
) -> None:
    out = tmp_path / "c"
    if index:
        build(teacher, corpus, out, shard_range=(0, 2))
    refused = pytest.raises(UserError, match=f"another process is at work on --shard-range {index}/2")
    with lock_range(Folder(out), (index, 2)), refused:
        build(teacher, corpus, out, shard_range=(index, 2))
    build(teacher, corpus, out, shard_range=(index, 2))
    build(teacher, corpus, out, shard_range=(1 - index, 2))
    assert_same(finish(out), whole)


def test_a_later_range_waits_for_the_first_one(
    teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    monkeypatch.setattr("logitcache.assembly.placement.LOOK_AGAIN_S", 0.01)
    later = threading.Thread(target=build, args=(teacher, corpus, out), kwargs={"shard_range": (1, 2)})
    later.start()
    time.sleep(0.5)
    assert not (out / ".build").exists()
    build(teacher, corpus, out, shard_range=(0, 2))
    later.join()
    assert_same(finish(out), whole)


def test_a_finish_that_was_cut_off_while_it_tidied_up_is_complete(
    teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    remove = Folder.remove

    def cut_off(folder: Folder, name: str) -> None:
        if name == ".build":
            remove(folder, ".build/shards")
            raise KeyboardInterrupt
        remove(folder, name)

    build(teacher, corpus, out, shard_range=(0, 1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Folder, "remove", cut_off)
        finish(out)
    assert_same(finish(out), whole)
    assert_same(build(teacher, corpus, out), whole)
    assert not (out / ".build").exists()


def test_nothing_is_finished_where_nothing_was_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to finish, no build was begun there"):
        finish(tmp_path / "c")


def test_a_build_into_an_object_store_is_resumed_and_read_there(
    teacher: Path,
    corpus: Path,
    whole: logitcache.LogitCache,
    bucket: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = f"{bucket}/caches/one"
    recorded: list[int] = []
    real = BuildPlan.record

    def stops_after_two(self: Any, index: int, info: Any) -> None:
        if len(recorded) == 2:
            raise KeyboardInterrupt
        recorded.append(index)
        real(self, index, info)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BuildPlan, "record", stops_after_two)
        build(teacher, corpus, out)
    with pytest.raises(UserError, match="unfinished build"):
        logitcache.open(out)
    assert_same(build(teacher, corpus, out), whole)
    assert_same(logitcache.open(out), whole)
    with pytest.raises(UserError, match=r"capture\.top_k was 16, now 8"):
        build(teacher, corpus, out, top_k=8)
    with pytest.raises(UserError, match="the folder is not empty and holds no cache"):
        build(teacher, corpus, f"{bucket}/caches")


def test_a_killed_vllm_engine_of_an_actor_is_a_lost_one(
    cluster: None, forked_vllm: None, teacher: Path, corpus: Path, tmp_path: Path, whole: logitcache.LogitCache
) -> None:
    def kill_an_engine() -> None:
        [engine] = [child for child in actors()[0].children(recursive=True) if "EngineCore" in child.name()]
        engine.kill()

    out = tmp_path / "c"
    killer = after_shards(out, 2, kill_an_engine)
    with pytest.raises(
        UserError, match="all engines were lost; the last one said: vLLM's engine ended while it was working"
    ):
        build(teacher, corpus, out, backend="vllm", executor="ray", engines=1, dtype="float32")
    killer.join()
    cache = build(teacher, corpus, out, backend="vllm", dtype="float32")
    for ours, theirs in zip(cache, whole, strict=True):
        assert ours.row_id == theirs.row_id
        assert np.allclose(ours.targets.logprobs, theirs.targets.logprobs, atol=1e-4)
        assert np.allclose(np.exp(ours.targets.tail_logprob), np.exp(theirs.targets.tail_logprob), atol=1e-6)


def test_a_cluster_that_is_gone_is_not_waited_for(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    rays = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's sockets take no longer path
    (rays / "ray").mkdir()
    (rays / "ray/ray_current_cluster").write_text("127.0.0.1:1")
    command = [
        *(sys.executable, "-m", "logitcache", "build", "--teacher", str(teacher), "--data", str(corpus)),
        *("--out", str(tmp_path / "c"), "--backend", "transformers", "--executor", "ray", "--engines", "1"),
    ]
    # No fork: Ray, once imported, keeps the token of the cluster that it knew then.
    run = subprocess.run(command, env=os.environ | {"RAY_TMPDIR": str(rays)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(logitcache.open(tmp_path / "c")) == 40
