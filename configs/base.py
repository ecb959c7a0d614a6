"""Every field of a run, with what it does. Other configs start from this one.

The values are those of the published SiT + Internal Guidance where it has one.
"""

from ml_collections import ConfigDict


def guidance(scale: float, low: float = 0.0, high: float = 1.0, channels: int = 0) -> ConfigDict:
    return ConfigDict({"scale": scale, "low": low, "high": high, "channels": channels})


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of initial weights, data order and training noise

    c.model = ConfigDict()
    c.model.name = "sit"  # sit, dit, lightningdit (its own fields: configs/lightningdit_xl.py)
    c.model.depth = 12  # blocks
    c.model.hidden_size = 768
    c.model.num_heads = 12
    c.model.patch_size = 2  # latent pixels a side
    c.model.mlp_ratio = 4.0
    c.model.qk_norm = False  # normalise every head's queries and keys
    c.model.readouts = (
        4,
    )  # depths (from 1) with an early head, for Internal Guidance; () for none
    c.model.time_scale = (
        1.0  # multiplies t before its sine features; a small network learns sooner with 1000
    )
    c.model.dtype = "float32"  # of matrix products: float32, bfloat16; parameters stay float32
    c.model.remat = (
        "none"  # recomputed in the backward pass: none, dots (all but matrix products), full
    )
    c.model.unroll = 1  # blocks per iteration of the scan over the depth

    c.process = ConfigDict()
    c.process.name = "flow"  # flow; ddpm (DiT's), which has no other fields
    c.process.path = "linear"  # linear, cosine (GVP), vp
    c.process.prediction = "velocity"  # velocity, noise, score
    c.process.time_distribution = "uniform"  # of training times: uniform, lognormal, logit_normal
    c.process.time_mean = 0.0  # of the normal draw behind the last two; above 0: more noise
    c.process.time_std = 1.0

    c.data = ConfigDict()
    c.data.source = ConfigDict({"name": "digits", "split": "train"})
    c.data.codec = ConfigDict({"name": "identity"})

    c.objective = ConfigDict()
    c.objective.label_drop = 0.1  # share of labels replaced by the null class; CFG needs some
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
    c.optim.clip_norm = 1.0  # of the gradient over all trained parameters; 0 is off
    c.optim.warmup_steps = 0
    c.optim.schedule = "constant"  # after warm-up: constant, cosine, linear

    c.mesh = ConfigDict()  # of devices; -1: the rest. The product is their number
    c.mesh.data = -1  # split the batch; share out optimizer and averages
    c.mesh.fsdp = 1  # split the batch and all weights, gathered a block at a time
    c.mesh.tensor = 1  # split heads and MLPs: for models too wide for one device

    c.train = ConfigDict()
    c.train.steps = (
        0  # length of the run: exactly one of steps, images, epochs; 0 means not this one
    )
    c.train.images = 0
    c.train.epochs = 0.0
    c.train.batch_size = 256  # over all devices
    c.train.accumulation = 1  # parts a batch is cut into, one after the other, to save memory
    c.train.steps_per_dispatch = (
        1  # steps per call of the compiled program; more helps small models
    )
    c.train.ema_decays = (0.9999,)  # of the averaged weights; sampling uses the first
    c.train.spike_factor = (
        0.0  # skips updates whose gradient norm is so many times the running median; 0 skips none
    )

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 10_000
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_every_steps = 100_000  # kept for good; 0 keeps none

    c.log = ConfigDict()
    c.log.every_steps = 100
    c.log.samples_every_steps = 10_000  # grids of samples while training; 0 draws none
    c.log.peak_tflops = 0.0  # of one device, for MFU; 0: by the table of known chips

    c.profile = ConfigDict()  # a trace for TensorBoard and Perfetto: docs/profiling.md
    c.profile.start = 20  # first step of it, counted from where this process begins
    c.profile.steps = 0  # 0 traces nothing

    c.sample = ConfigDict()
    c.sample.num = 64
    c.sample.batch_size = 64  # over all devices
    c.sample.seed = 0
    c.sample.labels = "random"  # random, balanced, or class numbers such as 0,1,2
    c.sample.weights = "ema"  # ema (the first decay), raw, or a decay such as 0.9999
    c.sample.files = ("png", "npz")  # numbered images, samples.npz as ADM reads it, or both
    c.sample.sampler = ConfigDict(
        {"name": "euler_maruyama", "num_steps": 250}
    )  # euler, heun, heun2, euler_maruyama, dopri5 (num_steps: at most; rtol=1e-3, atol=1e-6); of a
    # ddpm process also ancestral and ddim (eta=0.0): spacing="even", clip_denoised=False
    c.sample.time_shift = 1.0  # above 1: more of a fixed grid's steps at high noise
    c.sample.readout = 0  # depth that Internal Guidance extrapolates from; 0 is the first readout
    # Each guidance is on for t in [low, high] (0 is data, 1 is noise), on the first so many
    # channels (0: all); scale 1 is off.
    c.sample.ig = guidance(1.4)  # Internal Guidance
    c.sample.cfg = guidance(1.35, high=0.7)  # classifier-free guidance
    c.sample.autoguidance = guidance(1.0)  # away from a worse network, that of sample.guide
    c.sample.guide = ConfigDict(
        {"workdir": "", "step": 0, "weights": "ema"}  # a run and its checkpoint (0: the newest)
    )

    c.prepare = ConfigDict()  # --mode=prepare: images to latents, or one layout to another
    c.prepare.layout = "array_record"  # array_record, npy_folder (sd_vae), safetensors_shards
    c.prepare.batch_size = 64  # images encoded together, over all devices
    c.prepare.examples_per_file = 10_000  # also what a kill can cost
    c.prepare.bad_examples = "stop"  # stop at the first that cannot be read, or skip and list them

    c.evaluate = ConfigDict()
    c.evaluate.num = 50_000  # samples for each seed
    c.evaluate.seeds = (0,)  # sampling seeds; results are means and spreads over them
    c.evaluate.samples = ""  # evaluate these instead: an .npz with arr_0, or a folder of images
    # What images are compared by: inception (weights: pt_inception-2015-12-05-6726825d.pth), or
    # classifier, a small one fitted on the images of data.source.
    c.evaluate.features = ConfigDict({"name": "inception", "weights": ""})
    # Statistics of real images: ADM's .npz, mu and sigma, or what --mode=reference wrote; '': the
    # images that the classifier was fitted on.
    c.evaluate.reference = ""
    c.evaluate.while_training = ConfigDict({"every_steps": 0, "num": 10_000})  # 0: never

    c.search = ConfigDict()  # --mode=search: settings below `sample` that are tried
    c.search.metric = "fid"  # what decides: fid, sfid, fd, accuracy, precision, recall, ...
    c.search.num = 1000  # samples for each setting and seed
    c.search.rounds = 3  # the survivors are measured on 1, 2, 4, ... seeds
    c.search.keep = 0.5  # share that goes on after a round
    c.search.first_seed = 1000  # of sampling; others than evaluation's
    c.search.space = ConfigDict()
    c.search.space.method = "grid"  # grid: every combination; random: between least and greatest
    c.search.space.candidates = 32  # drawn by the random method
    c.search.space.values = ConfigDict(  # also low and high, and sampler.num_steps
        {"ig": {"scale": (1.0, 1.4, 1.8, 2.2)}, "cfg": {"scale": (1.0, 1.2, 1.4)}}
    )
    return c
