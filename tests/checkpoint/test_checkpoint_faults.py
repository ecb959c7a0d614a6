"""Damaged checkpoints are left out and named; a full disk stops no training and hides no loss."""

import errno
import gc
import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import tiny
from runs import assert_same_bits, metrics
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tiers import slow_but

from ig_jax.checkpoint import integrity
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import CheckpointError, Checkpoints, SaveFailed
from ig_jax.errors import UserError
from ig_jax.monitoring import console, metric_writer
from ig_jax.optim import train_state
from ig_jax.training import trainer

CONFIG = {"train": {"ema_decays": [0.9]}}
# Orbax drops the reads and writes that it has not ended when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def nothing_dropped_later():
    yield
    gc.collect()


def state(step):
    """About 100 kB in each part, so random that nothing compresses it."""
    w = np.random.default_rng(step).standard_normal((160, 160)).astype(np.float32)
    params = {"w": jnp.asarray(w), "b": jnp.ones(3)}
    return train_state.TrainState(jnp.int32(step), params, (params, jnp.int32(1)), {"0.9": params})


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def save(checkpoints, step):
    checkpoints.save(state(step), {"examples": step}, CONFIG)


def read(checkpoints):
    return lambda step: checkpoints.restore(step, LIKE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep_last=2)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


@contextmanager
def opened(*args, **options):
    checkpoints = Checkpoints(*args, **options)
    yield checkpoints
    checkpoints.close()


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def values(folder):
    """The file that holds the values of an item: by far its largest."""
    return max((folder / "ocdbt.process_0" / "d").iterdir(), key=lambda f: f.stat().st_size)


def index(folder):
    [file] = (folder / "d").iterdir()
    return file


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def put(file, text):
    file.write_text(text)


def flip(file, at=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0xFF
    file.write_bytes(content)


FAULTS = {
    "values cut": (lambda s: cut(values(s / "params")), r"params/ocdbt.process_0/d/\w+ has only"),
    "values gone": (lambda s: values(s / "ema").unlink(), r"ema/ocdbt.process_0/d/\w+ is missing"),
    "values empty": (lambda s: os.truncate(values(s / "ema"), 0), "has only 0 of "),
    "values garbled": (lambda s: flip(values(s / "params"), 0), "an array is garbled"),
    "index cut": (lambda s: cut(index(s / "opt_state")), r"opt_state/d/\w+ has only"),
    "index garbled": (lambda s: flip(index(s / "params")), r"params/d/\w+ is garbled"),
    "index gone": (lambda s: shutil.rmtree(s / "params" / "d"), r"params/d/\w+ is missing"),
    "manifest garbled": (lambda s: flip(s / "ema/manifest.ocdbt"), "ema/manifest.ocdbt is cut"),
    "manifest gone": (lambda s: (s / "ema/manifest.ocdbt").unlink(), "ema/manifest.ocdbt is miss"),
    "item gone": (lambda s: shutil.rmtree(s / "ema"), "ema/manifest.ocdbt is missing"),
    "names cut": (lambda s: cut(s / "params/_METADATA"), "params/_METADATA is cut short or garb"),
    "meta cut": (lambda s: cut(s / "meta/metadata"), "meta/metadata is cut short or garbled"),
    "names of another kind": (lambda s: put(s / "ema/_METADATA", "{}"), "_METADATA is not what w"),
    "names of the state gone": (lambda s: (s / "opt_state/_METADATA").unlink(), "TA is missing"),
    "shapes of another kind": (
        lambda s: put(s / "params/array_metadatas/process_0", "[]"),
        "process_0 is not what was written",
    ),
    "meta gone": (lambda s: shutil.rmtree(s / "meta"), "meta/metadata is missing"),
}


@pytest.mark.parametrize(
    "fault", slow_but(["values cut", "index garbled", "names cut", "meta gone"], FAULTS)
)
def test_a_damaged_checkpoint_is_named_and_put_aside_and_the_one_before_used(workdir, capfd, fault):
    step = workdir / "checkpoints" / "2"
    damage, words = FAULTS[fault]
    damage(step)
    left = files(step)
    with opened(workdir, keep_last=2) as checkpoints:
        used, found = checkpoints.newest(read(checkpoints))
        assert used == checkpoints.latest_step() == 1
        [said] = capfd.readouterr().out.splitlines()
        save(checkpoints, 2)
        checkpoints.wait()
        assert checkpoints.newest(read(checkpoints))[0] == 2
    assert_same_bits(found, state(1))
    aside = workdir / "unreadable" / "2"
    assert files(aside) == left
    before, after = f"{step} cannot be read (", f"): put aside as {aside}; step 1 is used"
    assert said.startswith(before) and said.endswith(after)
    assert re.search(words, said)


def change(folder, changes):
    file = folder / "meta" / "metadata"
    put(file, json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    slow_but(
        ["", "{'step': 3}", "{'data': {'next_index': -1}}", "{'config': {}}"],
        [
            *("", "[]", "null", "{}", "1", '"x"', '{"data": null}', "[" * 100_000, "\0" * 500),
            *('{"step": 2, "step": 2}', "{'step': 2}"),
            {"step": 3},
            {"step": "2"},
            {"step": None},
            {"data": None},
            {"data": {}},
            {"data": {"examples": "2"}},
            {"data": {"examples": -1}},
            {"data": {"next_index": "2"}},
            {"data": {"next_index": -1}},
            {"data": {"next_index": 2}, "config": {"train": {"ema_decays": [0.9]}}},
            {"config": {}},
            {"config": {"train": {"ema_decays": [0.9]}, "model": "sit"}},
            {"config": {"train": {"ema_decays": ["x"]}}},
            {"config": {"train": {"ema_decays": 0.9}}},
            {"versions": 3},
            {"imported": []},
            {"imported": "all"},
        ],
        name=lambda damage: str(damage)[:40],
    ),
)
@pytest.mark.parametrize("reading", [True, False])
def test_a_checkpoint_s_record_that_is_not_what_was_written_counts_as_damage(
    workdir, damage, reading, capfd
):
    step = workdir / "checkpoints" / "2"
    change(step, damage) if isinstance(damage, dict) else put(step / "meta/metadata", damage)
    with opened(workdir, keep_last=2, reading=reading) as checkpoints:
        with pytest.raises(CheckpointError, match="metadata: .*; choose another step"):
            checkpoints.meta(2)
        assert checkpoints.newest()[0] == 1
        assert checkpoints.meta(1)["data"] == {"examples": 1}
    assert "2 cannot be read (meta/metadata is " in capfd.readouterr().out


@pytest.mark.parametrize(
    "damage", slow_but(["3"], ["[]", "3", "[" * 100_000, '{"init_timestamp_nsecs": "x"}'])
)
def test_orbax_s_own_record_of_times_is_needed_by_nothing(workdir, damage):
    file = workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    put(file, damage)
    with pytest.raises(CheckpointError, match=f"{file}: is damaged; remove it"):
        Checkpoints(workdir, reading=True)
    with opened(workdir, keep_last=2) as checkpoints:
        used, found = checkpoints.newest(read(checkpoints))
    assert used == 2
    assert_same_bits(found, state(2))


def test_a_second_one_of_the_same_step_is_put_beside_the_first(workdir):
    (workdir / "unreadable" / "2").mkdir(parents=True)
    (workdir / "checkpoints" / "2" / "meta" / "metadata").unlink()
    with opened(workdir) as checkpoints:
        assert checkpoints.newest()[0] == 1
    assert sorted(p.name for p in (workdir / "unreadable").iterdir()) == ["2", "2-2"]


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["_CHECKPOINT_METADATA", "commit_success.txt", "ema/_METADATA"])
def test_files_that_reading_does_not_need_may_be_lost(workdir, capfd, marker):
    (workdir / "checkpoints" / "2" / marker).unlink()
    with opened(workdir) as checkpoints:
        used, found = checkpoints.newest(read(checkpoints))
    assert (used, capfd.readouterr().out) == (2, "")
    assert_same_bits(found, state(2))


def test_without_any_that_can_be_read_nothing_moves_and_all_are_named(workdir):
    for step in ("1", "2"):
        cut(workdir / "checkpoints" / step / "meta" / "metadata")
    left = files(workdir)
    with opened(workdir) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.newest()
    fault = "meta/metadata is cut short or garbled"
    assert f"{workdir}/checkpoints: holds no checkpoint that can be" in str(caught.value)
    assert f"(2: {fault}; 1: {fault}); put back copies" in str(caught.value)
    assert files(workdir) == left


def test_what_only_reads_leaves_damaged_and_unfinished_checkpoints_where_they_are(workdir, capfd):
    cut(values(workdir / "checkpoints" / "2" / "ema"))
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    left = files(workdir)
    checkpoints = checkpoint_manager.of_run(workdir, "--workdir")
    used, found = checkpoints.newest(lambda step: checkpoints.weights(step, "raw", LIKE.params))
    checkpoints.close()
    assert used == 1 and "): left out; step 1 is used" in capfd.readouterr().out
    assert_same_bits(found, state(1).params)
    assert files(workdir) == left


def test_only_what_is_read_need_be_whole(workdir, capfd):
    cut(values(workdir / "checkpoints" / "2" / "opt_state"))
    with opened(workdir, reading=True) as checkpoints:
        assert checkpoints.newest(arrays=checkpoint_manager.WEIGHTS)[0] == 2
        assert checkpoints.newest()[0] == 1


def test_imported_weights_have_no_other_arrays(tmp_path):
    with opened(tmp_path) as checkpoints:
        weights = state(0).replace(opt_state=None, ema=None)
        checkpoints.save(weights, {"examples": 0}, CONFIG, "weights")
        checkpoints.wait()
        assert checkpoints.newest()[0] == 0


@pytest.mark.parametrize("error", [UserError("other settings"), ValueError("NOT_FOUND: else")])
def test_any_other_error_of_the_reader_is_raised(workdir, error):
    def refuse(step):
        raise error

    left = files(workdir)
    with opened(workdir) as checkpoints, pytest.raises(type(error), match=str(error)):
        checkpoints.newest(refuse)
    assert files(workdir) == left


def test_arrays_of_another_shape_are_no_damage(workdir):
    other = jax.ShapeDtypeStruct((160, 161), jnp.float32, sharding=LIKE.params["w"].sharding)
    like = LIKE.replace(params={**LIKE.params, "w": other})
    with opened(workdir) as checkpoints, pytest.raises(ValueError, match="shape"):
        checkpoints.newest(lambda step: checkpoints.restore(step, like))
    assert not (workdir / "unreadable").exists()


def test_an_index_of_many_nodes_is_followed_to_the_last_value(tmp_path):
    spec = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{tmp_path}/params/"},
        "config": {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 16},
    }
    store = tensorstore.KvStore.open(spec).result()
    with tensorstore.Transaction(atomic=True) as transaction:
        for i in range(50):
            store.with_transaction(transaction)[f"array{i}"] = bytes([i]) * 20
    integrity.require_whole(tmp_path, ["params"])
    for file in (tmp_path / "params" / "d").iterdir():
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(integrity.Damaged) as caught:
            integrity.require_whole(tmp_path, ["params"])
        assert "has only" in caught.value.fault
        os.truncate(file, file.stat().st_size + 1)


@contextmanager
def files_of_at_most(size):
    """Makes the system refuse to write more to a file (EFBIG), as a full disk does (ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(checkpoints, step):
    """A save that finds no room for its arrays."""
    with files_of_at_most(50_000):
        save(checkpoints, step)
        while checkpoints._manager.is_saving_in_progress():
            time.sleep(0.01)


def partial_saves(workdir):
    return [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdecimal()]


def test_after_a_save_without_room_the_next_one_is_made(workdir, capfd):
    with opened(workdir) as checkpoints:
        refused(checkpoints, 3)
        save(checkpoints, 4)
        [said] = capfd.readouterr().out.splitlines()
        assert said.startswith("step 3 is not saved: File too large (")
        assert f"MiB free for {workdir}/checkpoints); the next save is tried" in said
        checkpoints.wait()
        assert checkpoints.all_steps() == [4]  # older ones are removed again
        used, found = checkpoints.newest(read(checkpoints))
    assert used == 4 and partial_saves(workdir) == []
    assert_same_bits(found, state(4))


def test_waiting_for_a_save_without_room_raises_and_leaves_the_ones_before(workdir, capfd):
    with opened(workdir) as checkpoints:
        refused(checkpoints, 3)
        with pytest.raises(SaveFailed) as caught:
            checkpoints.wait()
        assert checkpoints.latest_step() == 2 and partial_saves(workdir) == []
        assert_same_bits(checkpoints.newest(read(checkpoints))[1], state(2))
    assert "step 3 is not saved: File too large (" in str(caught.value)
    mend = "; step 2 is the newest one that is; make room and run the same command again"
    assert str(caught.value).endswith(mend)


def test_closing_with_a_save_without_room_says_so(workdir, capfd):
    with opened(workdir) as checkpoints:
        refused(checkpoints, 3)
    assert "step 3 is not saved" in capfd.readouterr().out and partial_saves(workdir) == []


def events(workdir):
    """All events; every record must be whole."""
    [file] = (workdir / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data, sums = content[12 : 12 + length], content[8:12] + content[12 + length : 16 + length]
        assert struct.unpack("<II", sums) == (masked_crc32c(content[:8]), masked_crc32c(data))
        found.append(Event.FromString(data))
        content = content[16 + length :]
    return found


def test_metrics_that_found_no_room_are_written_whole_later(tmp_path, capfd):
    writer = metric_writer.MetricWriter(tmp_path, resumed_at=0)
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    with files_of_at_most(1000):
        for step in range(1, 41):
            writer.scalars(step, {"loss": 1 / step})
            writer.images(step, "samples", picture)
        lines = (tmp_path / "metrics.jsonl").read_text()
        assert 10 < len(metric_writer.read_metrics(tmp_path)) < 30 and lines.endswith("}\n")
        assert len(events(tmp_path)) > 2
    said = capfd.readouterr().out.splitlines()
    assert [line.split(" cannot be written now: ")[0][:20] for line in said] == [
        "events.out.tfevents.",
        "metrics.jsonl",
    ]
    assert all(f"MiB free for {tmp_path}" in line for line in said)
    writer.close()
    assert [m["step"] for m in metric_writer.read_metrics(tmp_path)] == list(range(1, 41))
    scalars = [
        e.step for e in events(tmp_path) if e.summary.value and e.summary.value[0].tag != "samples"
    ]
    assert scalars == list(range(1, 41))


LINE = '{"step": 3, "images": 9, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "damage",
    slow_but(
        ['\'{"step": 200, "lo\'', "'[]'", '\'{"step": 3, "loss": "x"}\''],
        [
            *("", "\0" * 300, '{"step": 200, "lo', '{"loss": 1.0}', "[]", "null", "3", "\udcff"),
            *('{"step": "3"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[" * 9999),
            *('{"step": 3, "loss": "x"}', '{"step": 3, "loss": [1]}', '{"step": 3, "step": 3}'),
        ],
        name=lambda damage: repr(damage)[:30],
    ),
)
def test_a_damaged_line_of_metrics_costs_that_line(tmp_path, damage, capfd):
    content = f"{LINE}{damage}\n{LINE.replace('3', '4', 1)}{damage}\n"
    (tmp_path / "metrics.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    assert [m["step"] for m in metric_writer.read_metrics(tmp_path)] == [3, 4]
    assert capfd.readouterr().out == ""
    writer = metric_writer.MetricWriter(tmp_path, resumed_at=9)
    [said] = capfd.readouterr().out.splitlines()
    assert said == f"{tmp_path}/metrics.jsonl: 2 damaged lines are left out"
    writer.scalars(10, {"loss": 1.0})
    writer.close()
    assert [m["step"] for m in metric_writer.read_metrics(tmp_path)] == [3, 4, 10]
    metric_writer.MetricWriter(tmp_path, resumed_at=10).close()
    assert capfd.readouterr().out == ""


def test_other_errors_of_a_write_are_raised(tmp_path):
    with pytest.raises(FileNotFoundError), console.room_or_not("an image", tmp_path):
        open(tmp_path / "no" / "folder", "w")


class Log(io.StringIO):
    """What is told, on a disk that may be full."""

    full = False

    def flush(self):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(self, text):
        self.flush()
        return super().write(text)


def test_a_log_without_room_stops_neither_lines_nor_the_bar(monkeypatch):
    log = Log()
    monkeypatch.setattr("sys.stdout", log)
    monkeypatch.setattr("sys.stderr", log)
    with console.progress(2, unit="step", what="training") as bar:
        bar.mininterval = 0
        bar.update(1)
        assert "1/2" in log.getvalue()
        log.full = True
        bar.update(1)
        bar.set_postfix(loss="1")
        console.say("unheard")
    assert bar.n == 2 and "2/2" not in log.getvalue()


class Cramped(Checkpoints):
    """Finds no room for the steps in `without`."""

    without = (20,)

    def save(self, state, *args):
        room = 3000 if int(state.step) in self.without else 2**40
        with files_of_at_most(room):
            super().save(state, *args)
            while self._manager.is_saving_in_progress():
                time.sleep(0.01)


@pytest.mark.slow
def test_a_run_goes_on_after_a_save_without_room(tmp_path, monkeypatch, capfd):
    workdir = tiny.trained().copy(tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "24")
    monkeypatch.setattr(trainer, "Checkpoints", Cramped)
    outcome = trainer.run(tiny.experiment({"checkpoint.every_steps": 2}), workdir)
    assert outcome.finished
    assert capfd.readouterr().out.count("step 20 is not saved: File too large") == 1
    assert sorted(os.listdir(workdir / "checkpoints")) == ["22", "24"]


@pytest.mark.slow
def test_a_run_that_cannot_save_its_end_says_so(tmp_path, monkeypatch):
    workdir = tiny.trained().copy(tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "24")
    monkeypatch.setattr(trainer, "Checkpoints", Cramped)
    monkeypatch.setattr(Cramped, "without", (24,))
    with pytest.raises(SaveFailed, match="step 24 is not saved.*step 18 is the newest one"):
        trainer.run(tiny.trained().exp, workdir)
    assert os.listdir(workdir / "checkpoints") == ["18"]


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_repeats_its_steps_and_gets_the_same_bits(tmp_path):
    workdir = tiny.trained().copy(tmp_path)
    cut(values(workdir / "checkpoints" / "24" / "params"))
    outcome = trainer.run(tiny.trained().exp, workdir)
    assert_same_bits(outcome.state, tiny.trained().outcome.state)
    assert [m["step"] for m in metrics(workdir)] == [6, 12, 18, 24]
    assert os.listdir(workdir / "unreadable") == ["24"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(disk, leaving):
    free = shutil.disk_usage(disk).free
    (disk / "filled").write_bytes(bytes(max(0, free - leaving)))


@pytest.mark.slow
def test_a_disk_with_less_and_less_room_never_loses_the_newest_checkpoint(small_disk, capfd):
    (small_disk / "run").mkdir()
    step, failures = 1, 0
    for leaving in range(0, 500_000, 50_000):
        with opened(small_disk / "run") as checkpoints:
            save(checkpoints, step)
            checkpoints.wait()
            fill(small_disk, leaving)
            save(checkpoints, step + 1)
            try:
                checkpoints.wait()
            except SaveFailed as error:
                assert f"step {step + 1} is not saved: No space left on device" in str(error)
                assert f"; step {step} is the newest one that is" in str(error)
                assert partial_saves(small_disk / "run") == []
                failures += 1
            else:
                step += 1
            (small_disk / "filled").unlink()
            used, found = checkpoints.newest(read(checkpoints))
        assert used == step
        assert_same_bits(found, state(step))
        step += 1
    assert 2 < failures < 10


def test_a_full_disk_keeps_the_lines_of_metrics_whole(small_disk, capfd):
    writer = metric_writer.MetricWriter(small_disk, resumed_at=0)
    fill(small_disk, 8192)
    for step in range(1, 200):
        writer.scalars(step, {"loss": 1 / step})
    assert len(metric_writer.read_metrics(small_disk)) < 199
    (small_disk / "filled").unlink()
    writer.close()
    assert [m["step"] for m in metric_writer.read_metrics(small_disk)] == [*range(1, 200)]
    assert len(events(small_disk)) == 2 + 199
