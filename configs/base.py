"""Every field of a run, with what it does. Other configs start from this one.

`placeholder(int)` is None, which says that a field is not set, and takes an int later. On the
command line 0 sets such a number back to None, and an empty value (--config.evaluate.samples=) such
a text.

The values are those of the published SiT + Internal Guidance where it has one.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def guidance(scale: float, low: float = 0.0, high: float = 1.0, channels: int = 0) -> ConfigDict:
    return ConfigDict({"scale": scale, "low": low, "high": high, "channels": channels})


def self_conditioning() -> ConfigDict:
    """Of `c.model.self_conditioning`, a section that a config may lack: then it is off."""
    c = ConfigDict()
    # Block (from 1) whose tokens condition the later ones; None: half of the depth.
    c.tap = placeholder(int)
    c.normalise = True  # tokens, before their mean is taken
    # Of what is added to the condition, by the time: a factor for all channels (scalar), for each
    # (channels), or none.
    c.scaling = "channels"
    c.stop_gradient = False  # True: no gradient through that mean
    return c


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of initial weights, data order and training noise

    c.model = ConfigDict()
    # sit, dit or lightningdit, whose own fields are in configs/lightningdit_xl.py.
    c.model.name = "sit"
    c.model.depth = 12  # blocks
    c.model.hidden_size = 768
    c.model.num_heads = 12
    c.model.patch_size = 2  # latent pixels a side
    c.model.mlp_ratio = 4.0
    c.model.qk_norm = False  # normalise every head's queries and keys
    # Depths (from 1) with an early head, for Internal Guidance; () for none.
    c.model.readouts = (4,)
    # Multiplies t before its sine features; a small network learns sooner with 1000.
    c.model.time_scale = 1.0
    # Of matrix products: float32 or bfloat16; parameters stay float32.
    c.model.dtype = "float32"
    # Recomputed in the backward pass: none, dots (all but matrix products) or full.
    c.model.remat = "none"
    # Blocks per iteration of the scan over the depth. 1 compiles soonest; the depth, which writes
    # all blocks out, trains fastest.
    c.model.unroll = 1
    # Off; c.model.self_conditioning = self_conditioning() turns it on.

    c.process = ConfigDict()
    c.process.name = "flow"  # flow; ddpm (DiT's), which has no other fields
    c.process.path = "linear"  # linear, cosine (GVP), vp
    c.process.prediction = "velocity"  # velocity, noise, score
    # Of training times: uniform, lognormal or logit_normal.
    c.process.time_distribution = "uniform"
    # Of the normal draw behind the last two; a mean above 0 is more noise.
    c.process.time_mean = 0.0
    c.process.time_std = 1.0

    c.data = ConfigDict()
    c.data.source = ConfigDict({"name": "digits", "split": "train"})
    c.data.codec = ConfigDict({"name": "identity"})

    c.objective = ConfigDict()
    # Share of labels replaced by the null class; CFG needs some.
    c.objective.label_drop = 0.1
    # Decay of the average that some terms learn from, one of train.ema_decays; unset: the first.
    c.objective.teacher_decay = placeholder(float)
    # Random groups of each image's tokens (ig_jax/objectives/token_groups.py); () are none.
    c.objective.groups = ConfigDict()
    c.objective.groups.shares = ()
    c.objective.groups.dual_time = False  # each group has a time of its own
    c.objective.groups.separate_attention = False  # tokens attend to their own group only
    # Share of images all of whose tokens are in the second of two groups.
    c.objective.groups.full_sample_prob = 0.0
    c.objective.terms = ConfigDict()
    # Any term may have weight_factor, which multiplies its weight after each epoch behind the first
    # constant_epochs; without them the weight is constant.
    c.objective.terms.flow = ConfigDict({"weight": 1.0})
    c.objective.terms.internal_guidance = ConfigDict({"weight": 0.5})

    c.optim = ConfigDict()
    c.optim.name = "adamw"
    c.optim.learning_rate = 1e-4
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0
    # Of the gradient over all trained parameters; 0 is off.
    c.optim.clip_norm = 1.0
    c.optim.warmup_steps = 0
    c.optim.schedule = "constant"  # after warm-up: constant, cosine, linear

    # Devices along each axis; -1 is what the others leave. The product is the number of devices.
    c.mesh = ConfigDict()
    # Splits the batch; shares out optimizer and averages.
    c.mesh.data = -1
    # Splits the batch and all weights, which are gathered a block at a time.
    c.mesh.fsdp = 1
    # Splits heads and MLPs: for models too wide for one device.
    c.mesh.tensor = 1

    c.train = ConfigDict()
    # Length of the run: exactly one of steps, images and epochs.
    c.train.steps = placeholder(int)
    c.train.images = placeholder(int)
    c.train.epochs = placeholder(float)
    c.train.batch_size = 256  # over all devices
    # Parts a batch is cut into, one after the other, to save memory.
    c.train.accumulation = 1
    # Steps per call of the compiled program; more helps small models.
    c.train.steps_per_dispatch = 1
    # Of the averaged weights; sampling uses the first.
    c.train.ema_decays = (0.9999,)
    # Warm-up of all of them: a decay is at most 1 - (1 + step)^-power; 0 is none, 2/3 is usual.
    c.train.ema_warmup_power = 0.0
    # Lengths of power-function averages, from which --mode=ema composes any other, such as
    # (0.05, 0.1), in shares of the run: docs/averages.md. () trains without.
    c.train.ema_sigma_rel = ()
    # Skips updates whose gradient norm is so many times the running median; 0 skips none.
    c.train.spike_factor = 0.0
    # readouts: trains the readouts alone, of a network that is trained already (--init_from).
    c.train.only = placeholder(str)

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 10_000
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_every_steps = 100_000  # kept for good; 0 keeps none
    # Stores those of train.ema_sigma_rel for good; 0 stores none.
    c.checkpoint.averages_every_steps = 0

    c.log = ConfigDict()
    c.log.every_steps = 100
    # Grids of samples while training; 0 draws none.
    c.log.samples_every_steps = 10_000
    # Of one device in dense bfloat16, for MFU; None is the published one of known chips.
    c.log.peak_tflops = placeholder(float)

    # A trace for TensorBoard and Perfetto: docs/profiling.md.
    c.profile = ConfigDict()
    # The first step of it, counted from where this process begins.
    c.profile.start = 20
    c.profile.steps = 0  # 0 traces nothing

    c.sample = ConfigDict()
    c.sample.num = 64
    c.sample.batch_size = 64  # over all devices
    c.sample.seed = 0
    # random, balanced, or class numbers such as 0,1,2.
    c.sample.labels = "random"
    # ema (the first decay), raw, or a decay such as 0.9999.
    c.sample.weights = "ema"
    # Numbered images, samples.npz as ADM reads it, or both.
    c.sample.files = ("png", "npz")
    # euler, heun, heun2, dpmpp_2m, adams_bashforth, euler_maruyama, edm_stochastic (s_churn=40.0,
    # s_min=0.05, s_max=50.0, s_noise=1.003), or dopri5 (at most num_steps; rtol=1e-3, atol=1e-6);
    # of a ddpm process also ancestral and ddim (eta=0.0): spacing="even", clip_denoised=False.
    # docs/samplers.md compares them.
    c.sample.sampler = ConfigDict({"name": "euler_maruyama", "num_steps": 250})
    # Above 1: more of a fixed grid's steps at high noise.
    c.sample.time_shift = 1.0
    # Depth that Internal Guidance extrapolates from; None is the first readout.
    c.sample.readout = placeholder(int)
    # Share of each image's tokens that do not see the others, nor they them, drawn once or for each
    # step; 0 is full attention. For networks trained with objective.groups.separate_attention.
    c.sample.token_groups = ConfigDict({"share": 0.0, "each_step": False})
    # Each guidance is on for t in [low, high] (0 is data, 1 is noise), on the first so many
    # channels (0: all); scale 1 is off.
    c.sample.ig = guidance(1.4)  # Internal Guidance
    c.sample.cfg = guidance(1.35, high=0.7)  # classifier-free guidance
    # CFG asks for the null class in every k-th step, and uses the difference again in between; or
    # it asks the blocks up to a readout (a depth) alone. docs/samplers.md has what either costs.
    c.sample.null_class = ConfigDict({"every_steps": 1, "readout": placeholder(int)})
    c.sample.autoguidance = guidance(1.0)  # away from a worse network
    # That network: a run, and the step of its checkpoint (None is the newest).
    c.sample.guide = ConfigDict()
    c.sample.guide.workdir = placeholder(str)
    c.sample.guide.step = placeholder(int)
    c.sample.guide.weights = "ema"

    # --mode=prepare: images to latents, or one layout to another.
    c.prepare = ConfigDict()
    # array_record, npy_folder (sd_vae) or safetensors_shards.
    c.prepare.layout = "array_record"
    c.prepare.batch_size = 64  # images encoded together, over all devices
    c.prepare.examples_per_file = 10_000  # also what a kill can cost
    # stop at the first that cannot be read, or skip and list them.
    c.prepare.bad_examples = "stop"

    # --mode=visualize: tokens of images in the colours of their principal components.
    c.visualize = ConfigDict()
    # An image file, or a folder of them; None: held-out images of data.source, where there are any.
    c.visualize.images = placeholder(str)
    c.visualize.num = 4  # images, spread over the folder or the data set
    # To the size that the network was trained on: squash (both sides on their own) or crop.
    c.visualize.resize = "squash"
    # After which blocks, from 1; () is up to seven, spread over the depth.
    c.visualize.blocks = ()
    c.visualize.times = (0.7, 0.5, 0.3, 0.1)
    # Class numbers such as 0,1,2, in turn; None is the null class.
    c.visualize.labels = placeholder(str)
    c.visualize.seed = 0  # of the noise, the same at all times
    # Of tokens: layer_norm, or min_max (each channel over the tokens).
    c.visualize.norm = "layer_norm"
    # Each map of tokens has its own colours (cell), or all have the same (shared).
    c.visualize.basis = "cell"

    # --mode=probe: how well linear classifiers read the classes off the network's features.
    c.probe = ConfigDict()
    c.probe.times = (0.05, 0.1, 0.2, 0.3, 0.4)  # noise levels; 0 is data
    c.probe.blocks = ()  # from 1; () is all
    c.probe.labels = "null"  # what the network is told: null, the null class; or true
    c.probe.pooling = "mean"  # over the tokens of an image: mean or max
    c.probe.norm = "none"  # of a feature's channels: none, or batch (BatchNorm without affine)
    c.probe.flip = True  # whether half of the training images are mirrored
    c.probe.epochs = 15.0
    c.probe.batch_size = 128  # over all devices
    # Of Adam; it falls to 0 along a cosine.
    c.probe.learning_rate = 1e-3
    c.probe.weight_decay = 0.0
    # Of the training set, to choose the cell by; at least 1000 images, or a fifth of a smaller set.
    c.probe.validation_share = 0.01
    # k of the nearest neighbours by cosine, sought among so many training images; 0 seeks none.
    c.probe.neighbours = 20
    c.probe.bank = 50_000
    c.probe.seed = 0  # of the validation share, the order, the noise
    c.probe.save_every_steps = 1000  # what a kill can cost
    # The test set, as data.source but for its path or split; None: what the source holds out.
    c.probe.test_path = placeholder(str)
    c.probe.test_split = placeholder(str)

    c.evaluate = ConfigDict()
    c.evaluate.num = 50_000  # samples for each seed
    # Sampling seeds; results are means and spreads over them.
    c.evaluate.seeds = (0,)
    # Evaluated instead of samples of a checkpoint: an .npz with arr_0, or a folder of images.
    c.evaluate.samples = placeholder(str)
    # What images are compared by: inception (weights: pt_inception-2015-12-05-6726825d.pth), dinov2
    # (weights: dinov2_vitl14_pretrain.pth), or classifier, a small one fitted on the images of
    # data.source.
    c.evaluate.features = ConfigDict({"name": "inception", "weights": placeholder(str)})
    # Statistics of real images: ADM's .npz, mu and sigma, or what --mode=reference wrote; None: the
    # images that the classifier was fitted on.
    c.evaluate.reference = placeholder(str)
    # A section like evaluate.features adds the Frechet distance of a second encoder in the same
    # pass: c.evaluate.second_features = ConfigDict({"name": "dinov2", "weights": ...}). Its real
    # images' statistics, as evaluate.reference:
    c.evaluate.second_reference = placeholder(str)
    # every_steps = 0 is never.
    c.evaluate.while_training = ConfigDict({"every_steps": 0, "num": 10_000})
    # The flow loss of the first average on held-out examples under the same noise, eval/loss; 0 is
    # never.
    c.evaluate.while_training.loss_every_steps = 0

    # --mode=search: settings below `sample` that are tried.
    c.search = ConfigDict()
    # What decides: fid, sfid, fd, accuracy, precision, recall, ...
    c.search.metric = "fid"
    c.search.num = 1000  # samples for each setting and seed
    c.search.rounds = 3  # the survivors are measured on 1, 2, 4, ... seeds
    c.search.keep = 0.5  # share that goes on after a round
    c.search.first_seed = 1000  # of sampling; others than evaluation's
    c.search.space = ConfigDict()
    # grid: every combination; random: between least and greatest.
    c.search.space.method = "grid"
    c.search.space.candidates = 32  # drawn by the random method
    # Also low and high, sampler.num_steps, readout, and sigma_rel (docs/averages.md).
    c.search.space.values = ConfigDict(
        {"ig": {"scale": (1.0, 1.4, 1.8, 2.2)}, "cfg": {"scale": (1.0, 1.2, 1.4)}}
    )

    # --mode=study: methods trained under the same seeds, in one table (docs/study.md).
    c.study = ConfigDict()
    # Name -> {overrides: {...}, same_run_as: "", guide: "", init_from: ""}. Overrides are sections
    # of this config: None removes a field, a section of another name takes the old one's place.
    # same_run_as: the method whose run is sampled otherwise; guide, init_from: those whose run of
    # the same seed takes the place of sample.guide.workdir, and of --init_from.
    c.study.methods = ConfigDict()
    c.study.seeds = (0, 1, 2, 3, 4)  # of training, and of the samples
    # The method that the others are compared with.
    c.study.baseline = placeholder(str)
    # Of evaluate.num samples: fid, fd, precision, ...; loss, of held-out data; probe.
    c.study.measures = ("fid", "precision", "recall")
    # Linear classifiers on the mean tokens after these blocks.
    c.study.probe = ConfigDict({"blocks": (), "time": 0.1})

    # --mode=select: short runs of a choice, ranked.
    c.select = ConfigDict()
    # Sections of this config down to tuples: the values that a field may take; all combinations.
    c.select.values = ConfigDict()
    c.select.seeds = (0, 1, 2)
    c.select.metric = "loss"  # or one of samples: fid, fd, ...
    return c
