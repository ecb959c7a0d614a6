"""Settings of AdamW far from its defaults."""

from ig_jax.optim import AdamWSettings

SETTINGS = AdamWSettings(
    learning_rate=0.1,
    b1=0.8,
    b2=0.9,
    eps=1e-3,
    weight_decay=0.3,
    clip_norm=1.0,
    warmup_steps=0,
    schedule="constant",
)
