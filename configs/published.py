"""What --mode=import takes as given where a published file does not tell it."""

from ml_collections import ConfigDict

from configs import dit_xl, lightningdit_xl, sit_xl


def bases() -> dict[str, ConfigDict]:
    """Family of networks -> the run of its largest published model."""
    families = {"sit": sit_xl, "dit": dit_xl, "lightningdit": lightningdit_xl}
    return {name: module.get_config() for name, module in families.items()}
