"""--mode=import and --mode=export: what a published file is, what becomes of it, and back again."""

import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
import tiny
from places import KEYS
from published_networks import config_of, dit, sit
from safetensors.numpy import load_file, save_file
from torch_pickles import tensor, write

from configs import published
from ig_jax import modes, pytree
from ig_jax.checkpoint import compatibility
from ig_jax.codecs import to_uint8
from ig_jax.config.run_config import parse
from ig_jax.errors import UserError
from ig_jax.interop import parameter_names
from ig_jax.interop.declared import Declared
from ig_jax.interop.detect import detect
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.programs import export_checkpoint, import_checkpoint

SRA_HEAD = {"ap_head.linear1.weight": np.zeros((2, 2)), "ap_head.linear2.bias": np.zeros(2)}


def test_a_state_dict_says_its_sizes_and_options():
    _, _, state = sit()
    found = detect(state, Declared(readout_depth=2))
    assert (found.side, found.channels, found.classes) == (4, 3, lively.CLASSES)
    sizes = {"depth": 3, "hidden_size": 24, "num_heads": 3, "patch_size": 2}
    assert (
        found.model.items() >= {**sizes, "name": "sit", "readouts": (2,), "qk_norm": True}.items()
    )
    assert found.state.keys() == state.keys()


def test_a_lightningdit_says_its_options():
    kinds = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 1, "mlp_ratio": 4.0}
    rest = {"time_scale": 1.0, "dtype": "float32", "remat": "none", "unroll": 1}
    options = {"swiglu": True, "rope": False, "rms_norm": True, "shift": False, "qk_norm": True}
    settings = LightningDiTSettings(**kinds, **rest, **options, readouts=())
    net = Network(LightningDiT, settings, 4, 5, 7)
    found = detect(parameter_names.to_published(lively.parameters(net)))
    assert found.model == {"name": "lightningdit", **kinds, **rest, **options, "readouts": ()}
    assert (found.side, found.channels, found.classes) == (4, 5, 7)


XL, B = (28, 1152, 16), (12, 768, 12)
PUBLISHED = {
    # file: what must be told; family, sizes, depths with an early head
    "sit_official_xl2": ({"family": "sit"}, "sit", XL, ()),
    "dit_official_xl2": ({"family": "dit"}, "dit", XL, ()),
    "ig_sit_xl2": ({"readout_depth": 8}, "sit", XL, (8,)),
    "ig_sit_b2": ({"readout_depth": 4}, "sit", B, (4,)),
    "sra_sit_xl2": ({}, "sit", XL, ()),
    "sra_dit_xl2": ({}, "dit", XL, ()),
    "lightningdit_official_xl1": ({}, "lightningdit", XL, ()),
    "ig_lightningdit_xl1": ({"readout_depth": 8}, "lightningdit", XL, (8,)),
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_files_are_recognised_by_their_names_and_shapes(file):
    told, family, sizes, readouts = PUBLISHED[file]
    entries = json.loads((KEYS / f"{file}.json").read_text())
    state = {n: np.broadcast_to(np.float32(1), e["shape"]) for n, e in entries.items()}
    if parameter_names.DERIVED[0] in state:
        state |= parameter_names.rotary_tables(16, 72)
    found = detect(state, Declared(**told))
    model = found.model
    assert (model["name"], model["readouts"], found.classes) == (family, readouts, 1000)
    assert tuple(model[n] for n in ("depth", "hidden_size", "num_heads")) == sizes
    latents = (16, 32, 1) if family == "lightningdit" else (32, 4, 2)
    assert (found.side, found.channels, model["patch_size"]) == latents
    if family == "lightningdit":
        assert model["swiglu"] and model["rope"] and model["rms_norm"] and model["shift"]


def test_the_official_sit_is_turned_round_in_time_and_loses_its_sigma():
    official, weights, state = dit()
    net, *_ = sit(readouts=())
    x, _, y = lively.inputs(net)
    t = jnp.array([0.0, 0.3125, 0.75])  # 1 - t is exact
    expected = -official(weights, x, 1 - t, y).pred
    found = detect(state, Declared(family="sit"))
    assert any("turned round, exactly" in note for note in found.notes)
    turned = jax.tree.map(
        jnp.asarray, parameter_names.from_published(found.state, lively.abstract(net))
    )
    scale = np.abs(expected).max()
    # What float32 leaves of two sums over 256 features in another order, three blocks later.
    np.testing.assert_allclose(net(turned, x, t, y).pred, expected, rtol=0, atol=4e-6 * scale)
    assert np.abs(official(weights, x, t, y).pred - expected).max() > 0.1 * scale


def test_turning_time_round_is_exact_but_for_the_rounding_of_the_weights():
    _, _, state = dit()
    layer, head = "t_embedder.mlp.0.weight", "final_layer.linear.weight"
    turned = detect(state, Declared(family="sit")).state
    t = np.linspace(0, 1, 101)[:, None]
    frequencies = 10_000.0 ** (-np.arange(128) / 128)

    def features(t):
        return np.concatenate([np.cos(t * frequencies), np.sin(t * frequencies)], axis=1)

    direct = features(1 - t) @ state[layer].astype(np.float64).T
    np.testing.assert_allclose(features(t) @ turned[layer].T, direct, rtol=0, atol=1e-6)
    assert np.abs(features(t) @ state[layer].T - direct).max() > 0.1
    # Rows of the head: a pixel of the patch, then the velocity's channels and the sigma's.
    velocity = state[head].reshape(4, 2, 3, -1)[:, 0].reshape(12, -1)
    np.testing.assert_array_equal(turned[head], -velocity)


@pytest.mark.parametrize(
    ("extra", "told"), [({}, {"family": "dit"}), (SRA_HEAD, {}), (SRA_HEAD, {"family": "dit"})]
)
def test_a_dit_keeps_its_variance(extra, told):
    net, _, state = dit()
    found = detect(state | extra, Declared(**told))
    assert found.model["name"] == "dit" and found.state.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(found.state[name], array, err_msg=name)
    assert any("which the published ancestral steps of the config read" in n for n in found.notes)


def test_a_dit_of_another_process_is_sampled_and_trained_without_ddpms_steps():
    _, _, state = dit()
    found = detect(state | SRA_HEAD, Declared(process="flow"))
    assert not any("ancestral" in note for note in found.notes)
    c = import_checkpoint.config_of(found, published.bases())
    assert c.sample.sampler.name == "euler_maruyama"
    assert "variational_bound" not in c.objective.terms
    parse(c)  # refused with either of them


def test_what_only_training_needs_is_left_out_and_told():
    _, _, state = sit(readouts=())
    extra = {"projectors.0.0.weight": np.zeros((2, 2))}
    found = detect(state | SRA_HEAD | extra)
    assert found.state.keys() == state.keys()
    assert "ap_head, projectors" in found.notes[0]


def test_a_shrunken_position_table_is_told_and_kept():
    _, _, state = sit(readouts=())
    table = np.asarray(jax.jit(lively.make().init)(jax.random.key(0))["pos_embed"])
    found = detect(state | {"pos_embed": 0.25 * table})
    assert "0.2500 of a fresh one" in found.notes[-1]
    np.testing.assert_array_equal(found.state["pos_embed"], 0.25 * table)


@pytest.mark.parametrize(
    "make, extra, told, message",
    [
        (sit, {}, {}, "does not say where it reads: give --readout_depth"),
        (dit, {}, {}, "say --family=sit or --family=dit"),
        (dit, SRA_HEAD, {"family": "sit"}, "--family=sit: the checkpoint is a dit"),
        (
            sit,
            {},
            {"family": "dit", "readout_depth": 2},
            "--family=dit: the checkpoint learned no v",
        ),
    ],
)
def test_what_the_file_does_not_say_must_be_told_and_told_right(make, extra, told, message):
    _, _, state = make()
    with pytest.raises(UserError, match=message):
        detect(state | extra, Declared(**told))


def test_a_file_of_something_else_is_refused():
    with pytest.raises(
        UserError, match="is no SiT, DiT or LightningDiT: it lacks 'pos_embed'.*holds 'a'"
    ):
        detect({"a": np.zeros(1)})


def test_a_readout_depth_without_a_head_and_unknown_widths_are_refused():
    _, _, state = sit(readouts=())
    with pytest.raises(UserError, match="readout_depth=2: the checkpoint has no intermediate head"):
        detect(state, Declared(readout_depth=2))
    bare = {n: a for n, a in state.items() if "_norm" not in n}
    with pytest.raises(
        UserError, match="no published network has width 24 and depth 3: say --num_heads"
    ):
        detect(bare | SRA_HEAD)


# The programs.


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run made from a file, with the state dict that the file holds."""
    folder = tmp_path_factory.mktemp("import")
    _, _, state = sit()
    save_file(state, folder / "published.safetensors")
    import_checkpoint.import_checkpoint(
        folder / "published.safetensors", folder / "run", published.bases(), readout_depth=2
    )
    return folder, state


def test_import_then_export_gives_the_same_bits(imported):
    folder, state = imported
    export_checkpoint.export_checkpoint(folder / "run", folder / "back.safetensors", "ema")
    back = load_file(folder / "back.safetensors")
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    card = (folder / "back.md").read_text()
    assert card.startswith("---\nlibrary_name: ig-jax\n") and "imported from a published" in card
    told = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert told["model"]["readouts"] == [2] and "loads strictly in | SiT of SiT + IG" in card


@pytest.mark.slow
def test_an_imported_run_is_sampled_with_the_config_beside_it(imported):
    folder, _ = imported
    c = config_of(folder / "run" / "config.py")
    c.sample.num, c.sample.batch_size, c.sample.sampler.num_steps = 3, 4, 2
    target = modes.run(c, workdir=str(folder / "run"), mode="sample")
    with np.load(target / "samples.npz") as file:
        assert file["arr_0"].shape == (3, 4, 4, 3) and np.ptp(file["arr_0"]) > 0


@pytest.mark.slow
def test_a_dit_is_imported_sampled_and_exported_again_with_the_same_bits(tmp_path):
    _, _, state = dit()
    save_file(state | SRA_HEAD, tmp_path / "sra.safetensors")
    c = config_of(
        import_checkpoint.import_checkpoint(
            tmp_path / "sra.safetensors", tmp_path / "a", published.bases()
        )
    )
    assert c.process.to_dict() == {"name": "ddpm"}
    assert c.sample.cfg.channels == 3 and c.sample.ig.scale == 1
    published_steps = {"name": "ancestral", "num_steps": 250, "spacing": "even"}
    assert c.sample.sampler.to_dict() == {**published_steps, "clip_denoised": False}
    assert c.objective.terms.variational_bound.weight == 1 and c.sample.cfg.scale == 1.5
    c.sample.num, c.sample.batch_size, c.sample.sampler.num_steps = 3, 4, 2
    target = modes.run(c, workdir=str(tmp_path / "a"), mode="sample")
    with np.load(target / "samples.npz") as file:
        assert file["arr_0"].shape == (3, 4, 4, 3) and np.ptp(file["arr_0"]) > 0
    export_checkpoint.export_checkpoint(tmp_path / "a", tmp_path / "once.safetensors", "ema")
    import_checkpoint.import_checkpoint(
        tmp_path / "once.safetensors", tmp_path / "b", published.bases()
    )
    export_checkpoint.export_checkpoint(tmp_path / "b", tmp_path / "twice.safetensors", "ema")
    for file in ("once", "twice"):
        back = load_file(tmp_path / f"{file}.safetensors")
        whole = state | SRA_HEAD
        assert back.keys() == whole.keys() and len(back["final_layer.linear.bias"]) == 24
        for name, array in whole.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.slow
def test_an_imported_run_is_trained_on_from_its_weights_under_other_settings(imported, tmp_path):
    folder, state = imported
    workdir = tmp_path / "run"
    path = import_checkpoint.import_checkpoint(
        folder / "published.safetensors", workdir, published.bases(), readout_depth=2
    )
    c = config_of(path)
    # A field that is None in the file itself could not be set on the command line.
    assert None not in pytree.flatten(c.to_dict()).values()
    c.train.update({"steps": 2, "epochs": 0.0, "batch_size": 4})
    c.optim.learning_rate = 1e-6
    c.log.samples_every_steps = 0
    assert modes.run(c, workdir=str(workdir)).step == 2
    export_checkpoint.export_checkpoint(workdir, tmp_path / "trained.safetensors", "raw")
    trained = load_file(tmp_path / "trained.safetensors")
    moved = max(np.abs(trained[name] - array).max() for name, array in state.items())
    assert 0 < moved < 1e-5
    c.model.qk_norm = False
    with pytest.raises(UserError, match="model.qk_norm: True there, False here"):
        modes.run(c, workdir=str(workdir))


def test_an_existing_run_is_not_overwritten_and_mistakes_name_the_file(imported, tmp_path):
    folder, state = imported
    fresh = tmp_path / "run"
    with pytest.raises(UserError, match="holds a run already"):
        import_checkpoint.import_checkpoint(
            folder / "published.safetensors", folder / "run", published.bases()
        )
    with pytest.raises(UserError, match="nowhere.pt: no such file"):
        import_checkpoint.import_checkpoint(tmp_path / "nowhere.pt", fresh, published.bases())
    (tmp_path / "broken.safetensors").write_bytes(b"\x08" + bytes(7) + b"{nothing")
    with pytest.raises(UserError, match="broken.safetensors: no readable safetensors file"):
        import_checkpoint.import_checkpoint(
            tmp_path / "broken.safetensors", fresh, published.bases()
        )
    lacking = {n: a for n, a in state.items() if n != "blocks.1.mlp.fc1.weight"}
    save_file(lacking | {"extra.bias": np.zeros(2)}, tmp_path / "lacking.safetensors")
    with pytest.raises(UserError, match="lacks 'blocks.1.mlp.fc1.weight'.*lacks: 'extra.bias'"):
        import_checkpoint.import_checkpoint(
            tmp_path / "lacking.safetensors", fresh, published.bases(), readout_depth=2
        )
    assert not fresh.exists()
    with pytest.raises(UserError, match="must end in .safetensors"):
        export_checkpoint.export_checkpoint(folder / "run", tmp_path / "weights.bin", "ema")


NAMES = [
    ("run", 'a"""\n+print("ran")+"""b\\.safetensors'),
    ('run \' " $(touch x) `y` \n +"""+z', "a.safetensors"),
    ("run", "b\udcff\udcfe.safetensors"),
    ("é {0} {values} %s", "{file} {}.safetensors"),
]


@pytest.mark.parametrize(("workdir", "file"), NAMES)
def test_a_name_is_only_ever_a_name(imported, tmp_path, monkeypatch, capsys, workdir, file):
    """Whatever it holds: in the config, in the command that is shown, from another folder."""
    folder, state = imported
    save_file(state, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / file)
    monkeypatch.setattr(import_checkpoint, "_save", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    modes.import_file(file, workdir, published.bases(), readout_depth=2)
    shown = capsys.readouterr().out.partition("sample it: ")[2]
    monkeypatch.chdir("/")
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in shlex.split(shown))
    assert flags["workdir"] == str(tmp_path / workdir)
    c = config_of(Path(flags["config"]))
    expected = config_of(folder / "run" / "config.py")
    assert c.to_dict() == expected.to_dict()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "says"), [("a:b", "has a colon"), ("a\\b", "a backslash"), ("a[0]", "brackets"),
                       ("a\udcff", "no UTF-8")]
)  # fmt: skip
def test_a_workdir_whose_checkpoint_would_be_lost_is_refused(imported, tmp_path, name, says):
    file = imported[0] / "published.safetensors"
    with pytest.raises(UserError, match=says):
        import_checkpoint.import_checkpoint(
            file, tmp_path / name, published.bases(), readout_depth=2
        )


@pytest.mark.slow
def test_a_run_of_any_width_comes_back_without_a_flag(tmp_path):
    trained = tiny.trained()
    export_checkpoint.export_checkpoint(
        trained.workdir, tmp_path / "a b" / "out.safetensors", "raw"
    )
    config = import_checkpoint.import_checkpoint(
        tmp_path / "a b" / "out.safetensors", tmp_path / "run", published.bases()
    )
    c = config_of(config)
    ours = trained.exp.config
    assert c.model.to_dict() == trained.exp.config.raw["model"] | {"dtype": "float32"}
    assert c.data.codec.name == "identity" and c.data.source.num_classes == 10
    assert c.process.path == ours.process.path and c.objective.label_drop == 0.1
    export_checkpoint.export_checkpoint(tmp_path / "run", tmp_path / "again.safetensors", "ema")
    again = load_file(tmp_path / "again.safetensors")
    for name, array in load_file(tmp_path / "a b" / "out.safetensors").items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_the_published_rule_to_8_bits_is_set_by_family(tmp_path):
    _, _, state = dit(channels=4)
    for family, rule in (("sit", to_uint8.ROUNDED), ("dit", to_uint8.ROUNDED)):
        c = import_checkpoint.config_of(detect(state, Declared(family=family)), published.bases())
        assert parse(c).data.codec.rounding == rule
    _, _, state = sit(channels=4, readouts=())
    c = import_checkpoint.config_of(detect(state), published.bases())
    assert parse(c).data.codec.rounding == to_uint8.TRUNCATED
    older = c.to_dict()
    del older["data"]["codec"]["rounding"]
    assert not compatibility.mismatches(older, c.to_dict(), compatibility.CONTINUES)


def test_a_damaged_remainder_of_an_import_is_told_and_left_out(imported, tmp_path, capsys):
    folder = imported[0]
    workdir = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    for content in (b"", b"\x08" + bytes(7) + b"{nothing", b"<html>"):
        (workdir / "imported.safetensors").write_bytes(content)
        export_checkpoint.export_checkpoint(workdir, tmp_path / "back.safetensors", "ema")
        assert "exported without what the published file had besides" in capsys.readouterr().out
    assert load_file(tmp_path / "back.safetensors").keys() == imported[1].keys()


def test_a_training_file_of_pytorch_is_imported_from_its_averages(tmp_path):
    _, _, state = sit()
    raw = {f"module.{name}": tensor(np.zeros_like(array)) for name, array in state.items()}
    average = {f"module.{name}": tensor(array) for name, array in state.items()}
    write(tmp_path / "step-10.pt", {"model": raw, "ema": average, "steps": 10})
    workdir = tmp_path / "run"
    import_checkpoint.import_checkpoint(
        tmp_path / "step-10.pt", workdir, published.bases(), readout_depth=2
    )
    export_checkpoint.export_checkpoint(workdir, tmp_path / "back.safetensors", "ema")
    back = load_file(tmp_path / "back.safetensors")
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
