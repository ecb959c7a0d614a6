"""Quality of generated images: features of images, and numbers of features.

A feature space turns images into features on devices: `Inception` for FID and its relatives,
`Dinov2` for FD_DINOv2, or `Classifier`, a small one fitted on the data. The formulas are the same
for all; what sums over many samples is in float64. Nothing here knows a network that is evaluated.
"""

from ig_jax.metrics.classifier import Classifier
from ig_jax.metrics.dinov2 import Dinov2
from ig_jax.metrics.inception import Inception

# Config name -> feature space. A new one is a file here and a row.
FEATURES = {"inception": Inception, "dinov2": Dinov2, "classifier": Classifier}
