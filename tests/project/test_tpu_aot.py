"""What is read from an optimised program, and what the benchmark says where it cannot compile."""

import argparse
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from places import ROOT

from benchmarks import hlo, tpu_aot
from ig_jax.errors import UserError
from ig_jax.parallel import collectives

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[8,64]) -> (bf16[8,64], bf16[64,64], u32[]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[64,64]{1,0:T(8,128)} all-gather(%p), frontend_attributes={chain_id="3"}
  ROOT %call = (bf16[8,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) custom-call(%ag.1)
}

%meanwhile (q: bf16[8,64]) -> bf16[64,64] {
  %q = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.2 = bf16[64,64]{1,0:T(8,128)} all-gather(%q), frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (g: f32[80,16]) -> f32[10,16] {
  %g = f32[80,16]{1,0} parameter(0)
  %ar.1 = f32[80,16]{1,0} all-reduce(%g), channel_id=9, to_apply=%add
  ROOT %own = f32[10,16]{1,0} dynamic-slice(%ar.1), dynamic_slice_sizes={10,16}
}

%body (state: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %state = (s32[], bf16[8,64]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%state), index=1
  %first = (bf16[8,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %second = bf16[64,64]{1,0} fusion(%x), kind=kOutput, calls=%meanwhile
  %grad = f32[64,32]{1,0} convert(%second)
  %rs = f32[8,32]{1,0} reduce-scatter(%grad), channel_id=1, dimensions={0}, to_apply=%add
  %rs.2 = f32[10,16]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1
  %halo = (f32[2,16]{1,0}, f32[2,16]{1,0}, u32[]) collective-permute-start(%rs.2)
  %halo.2 = f32[2,16]{1,0} collective-permute-done(%halo)
  ROOT %next = (s32[], bf16[8,64]{1,0}) tuple(%i, %x)
}

%condition (state.1: (s32[], bf16[8,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,64]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (x0: bf16[8,64]) -> f32[4] {
  %x0 = bf16[8,64]{1,0} parameter(0)
  %ag.8 = f32[64,8]{1,0:T(8,128)} all-gather(%w), channel_id=1, dimensions={0}
  %ag.9 = f32[64,8]{1,0:T(8,128)} all-gather(%v), channel_id=1, dimensions={0}
  %loop = (s32[], bf16[8,64]{1,0}) while(%init), condition=%condition, body=%body
  %ar.2 = (f32[4]{0:T(128)S(1)}, f32[2,3]{1,0:T(8,128)}) all-reduce(%y, %z), to_apply=%add
  %rs.3 = f32[10,16]{1,0} fusion(%x0), kind=kCustom, calls=%all-reduce-scatter.1
  %swap = bf16[4,64]{1,0} all-to-all(%x0), channel_id=3, dimensions={0}
  ROOT %out = f32[4]{0} get-tuple-element(%ar.2), index=0, metadata={op_name="all-gather(%x)"}
}
"""


def found(kind: str, in_loop: bool) -> list[tuple[tuple[str, ...], int]]:
    sent = hlo.collectives(PROGRAM).items()
    return [(s.arrays, n) for s, n in sent if (s.kind, s.in_loop) == (kind, in_loop)]


def test_the_steps_of_one_overlapped_collective_are_one():
    assert found("all-gather", in_loop=True) == [(("bf16[64,64]",), 1)]


def test_collectives_outside_loops_are_counted_each():
    assert found("all-gather", in_loop=False) == [(("f32[64,8]",), 2)]
    assert found("reduce-scatter", in_loop=False) == [(("f32[80,16]",), 1)]


def test_a_reduce_scatter_is_told_by_what_goes_in_and_an_all_reduce_cut_up_is_one():
    scattered = found("reduce-scatter", in_loop=True)
    assert sorted(scattered) == [(("f32[64,32]",), 1), (("f32[80,16]",), 1)]
    assert found("all-reduce", in_loop=True) == []


def test_combined_collectives_are_one_of_several_arrays():
    assert found("all-reduce", in_loop=False) == [(("f32[4]", "f32[2,3]"), 1)]


def test_what_is_sent_asynchronously_is_counted_at_its_start():
    assert found("collective-permute", in_loop=True) == [(("f32[2,16]",), 1)]


def test_the_larger_side_counts():
    assert found("all-to-all", in_loop=False) == [(("bf16[8,64]",), 1)]


def test_bytes_are_those_of_the_type():
    sizes = {s.arrays: s.bytes for s in hlo.collectives(PROGRAM)}
    assert sizes[("bf16[64,64]",)] == 64 * 64 * 2
    assert sizes[("f32[4]", "f32[2,3]")] == (4 + 6) * 4


def test_a_summary_adds_up_what_is_alike():
    reported = json.loads(json.dumps(hlo.report(PROGRAM)))  # as a file keeps it
    assert "2 all-gather f32 0 MiB" in hlo.summary(reported, in_loop=False).split(", ")
    large = [{**each, "mib_each": 8.0} for each in reported]
    assert "2 all-gather f32 16 MiB" in hlo.summary(large, in_loop=False)
    assert "2 reduce-scatter f32 16 MiB" in hlo.summary(large, in_loop=True)
    assert hlo.summary([], in_loop=True) == "none"


def test_without_libtpu_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # cannot be imported
    monkeypatch.setattr(sys, "argv", ["tpu_aot.py"])
    with pytest.raises(SystemExit) as ended:
        tpu_aot.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.count("\n") == 1 and 'pip install -r requirements.txt "jax[tpu]"' in err


def test_a_config_that_is_not_there_is_named():
    flags = argparse.Namespace(config="configs/sit_xxl.py")
    with pytest.raises(UserError, match="--config=configs/sit_xxl.py: no such file"):
        tpu_aot.settings(flags, devices=8)


@pytest.mark.parametrize("topology", ["v5e", "v3:2x2", "v5e:2", "v5e:2xb", "2x4"])
def test_a_topology_that_is_none_is_named(topology):
    with pytest.raises(UserError, match=f"--topology={topology}: must be a chip and a shape"):
        tpu_aot.chip(topology)


def record(batch: int, needed: float) -> dict:
    memory = {"arguments": 1.0, "temporaries": 2.0, "needed": needed, "available": 15.75}
    return {
        **{"what": "train", "config": "configs/sit_xl.py", "topology": "v5e:2x4"},
        "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
        **{"remat": "dots", "batch_per_device": batch, "fits": needed <= 15.75},
        **{"memory_gib": memory, "collectives": [], "compile_seconds": 90.4},
    }


def test_a_setting_compiled_again_replaces_its_result(tmp_path):
    file = tmp_path / "results.json"
    tpu_aot.keep(file, record(32, needed=9.0))
    tpu_aot.keep(file, record(64, needed=3.0))
    kept = tpu_aot.keep(file, record(32, needed=4.0))
    assert [(r["batch_per_device"], r["memory_gib"]["needed"]) for r in kept] == [(32, 4), (64, 3)]
    assert json.loads(file.read_text()) == kept


def test_the_table_marks_what_does_not_fit():
    refused = {**record(96, needed=0.0), "refused": "temporaries (20G) exceeds available HBM (15G)"}
    lines = tpu_aot.table([record(64, needed=15.7), record(72, needed=15.8), refused]).splitlines()
    assert {line.count("|") for line in lines} == {13}
    fits, too_much, none = lines[2:]
    assert "15.70 of 15.75 |" in fits
    assert "15.80 of 15.75 (too much) |" in too_much
    assert "refused: temporaries (20G) exceeds" in none


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tiny_step_for_v5e_gathers_one_block_at_a_time(tmp_path):
    results = tmp_path / "results.json"
    command = [
        "benchmarks/tpu_aot.py",
        "--config=tests/helpers/tiny.py",
        "--remat=full",
        "--batch=2",
    ]
    done = subprocess.run(
        [sys.executable, *command, f"--json={results}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [report] = json.loads(results.read_text())
    assert report["fits"] and report["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    gathers = [c for c in report["collectives"] if c["kind"] == "all-gather" and c["in_loop"]]
    # A block's five matrices, forward and again backward; each is a slice [1, ...] of its stack.
    assert sum(c["count"] for c in gathers) == 2 * 5
    assert all("[1," in array for c in gathers for array in c["arrays"])


def gradient_of_a_projection(mesh: Mesh) -> jax.stages.Traced:
    """Of the matrix behind attention, [heads, channels, width], split along its last axis."""
    split, rows = PartitionSpec(None, None, "fsdp"), PartitionSpec("fsdp")

    def loss(w, x):
        whole = collectives._together(w, 2, ("fsdp",), jnp.bfloat16, of_blocks=True)
        out = jnp.einsum("bnhd,hde->bne", x, whole)
        return jnp.sum(jnp.square(out).astype(jnp.float32))

    gradient = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(split, rows), out_specs=split, check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((16, 72, 1152), jnp.float32, split),
            ((16, 256, 16, 72), jnp.bfloat16, rows),
        )
    ]
    return jax.jit(gradient).trace(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_the_gradient_of_every_matrix_is_summed_and_split_at_once_on_tpus(monkeypatch, backend):
    """And not without what asks for it: the first is what XLA does by itself."""
    mesh = Mesh(np.array(tpu_aot.described_devices("v5e:2x4")), ("fsdp",))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    traced = gradient_of_a_projection(mesh)
    monkeypatch.undo()
    sent = [(s.kind, s.arrays) for s in hlo.collectives(traced.lower().compile().as_text())]
    kind = {"cpu": "all-reduce", "tpu": "reduce-scatter"}[backend]
    assert (kind, ("f32[16,72,1152]",)) in sent
    assert {kind for kind, _ in sent} == {kind, "all-gather"}
