"""Statistics of real images, from the files that the tools of the field publish, and from ours.

  ADM              .npz    mu, sigma, mu_s, sigma_s of a whole training set, arr_0: some images
  MAR              .npz    mu, sigma
  MeanFlow         .npz    ref_mu, ref_sigma
  EDM2             pickle  {"fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}}
  others           pickle  {"mu", "sigma"}, or the other names of an .npz
  ours             .npz    as ADM's, but `pool`, features of some images, in place of arr_0;
                           `space`, which weights made the features; `count`, of how many images

mu and sigma are the mean and the covariance of the pooled features, mu_s and sigma_s those of the
spatial ones, of which the sFID is taken. A file of images only holds no statistics yet.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ig_jax.errors import UserError, listed
from ig_jax.io import files, npz, numpy_pickle
from ig_jax.metrics.checked_rows import BLOCK_ROWS, row_blocks
from ig_jax.metrics.moments import Gaussian

POOL, SPATIAL = (("mu", "sigma"), ("ref_mu", "ref_sigma")), (("mu_s", "sigma_s"),)
_ROWS, _IMAGES, SPACE, _COUNT = "pool", "arr_0", "space", "count"
# Covariances are symmetric to the rounding of float32 at worst.
ASYMMETRY = 1e-5
MOST_FEATURES = 8192  # of Inception's there are 2048
_FEWEST = 4  # single images, of which precision and recall take the three nearest to each
_FIX = "choose a file of statistics, or write one with --mode=reference"


class Reference(NamedTuple):
    """Statistics of real images from a file; large arrays are views of the file."""

    pool: Gaussian | None  # of pooled features; None: must be computed from `images`
    spatial: Gaussian | None  # None: unknown
    rows: np.ndarray | None  # float32 [n, d]: pooled features of single images
    images: np.ndarray | None  # uint8 [n, h, w, 3]
    space: str  # digest of the weights of the feature space; '': unknown
    digest: str  # SHA-256 of the file


def read(path: Path, field: str, distance: str = "fid") -> Reference:
    """Reads statistics, float64 but for the large arrays.

    Args:
      path: of the file.
      field: of the config that names it, for the messages.
      distance: which one is wanted of a file with those of several encoders, as EDM2's.

    Raises:
      UserError: the file is absent, damaged or of no known kind, it holds neither statistics nor
        images, or an array has another shape or dtype than it must have.
    """
    try:
        if os.path.isdir(path):
            raise UserError(
                f"{path}: is a folder; take statistics of its images with --mode=reference and "
                f"--config.data.source.path={path}, and name the file that it writes"
            )
        names, array = _open(path, distance)
        arrays = _Arrays(path, names, array)
        pool, images = arrays.gaussian(POOL), arrays.images()
        if pool is None and images is None:
            raise UserError(
                f"{path}: has neither 'mu' and 'sigma' nor 'arr_0', but {listed(names)}; {_FIX}"
            )
        spatial, rows = arrays.gaussian(SPATIAL), arrays.rows(pool)
        return Reference(pool, spatial, rows, images, arrays.space(), files.sha256(path))
    except UserError as refusal:
        raise UserError(f"{field} = {refusal}") from None


def write(
    path: Path,
    pool: Gaussian,
    spatial: Gaussian | None,
    rows: np.ndarray,
    *,
    space: str,
    count: int,
) -> None:
    """Writes a file of our kind, which other tools read as one of ADM's without images.

    Args:
      pool, spatial: of all images; None: the feature space has no spatial features.
      rows: float32 [n, d], pooled features of some images.
      space: digest of the weights of the feature space.
      count: how many images there were.
    """
    members = dict(zip(POOL[0], pool, strict=True))
    if spatial is not None:
        members |= zip(SPATIAL[0], spatial, strict=True)
    others = {_ROWS: rows, SPACE: np.array(space), _COUNT: np.array(count)}
    npz.write(path, members | others)


def _open(path: Path, distance: str) -> tuple[list[str], Callable[[str], Any]]:
    """Names of the arrays in the file, and what gives one by its name."""
    with files.open_regular(path) as file:
        start = file.read(2)
    if start == b"PK":
        return npz.names(path), lambda name: npz.read_array(path, name)
    if start[:1] != b"\x80":
        raise UserError(f"{path}: is neither an .npz nor a pickle; {_FIX}")
    match numpy_pickle.load(path):
        case {**found}:
            arrays = _of_encoder(path, found, distance)
            return [n for n in arrays if isinstance(arrays[n], np.ndarray)], arrays.__getitem__
    raise UserError(f"{path}: is a pickle without {{'mu', 'sigma'}}; {_FIX}")


def _of_encoder(path: Path, found: dict[Any, Any], distance: str) -> dict[Any, Any]:
    """What a pickle holds, or of several encoders the one whose distance this is."""
    encoders = [name for name, inner in found.items() if isinstance(inner, dict)]
    if not encoders:
        return found
    if distance not in encoders:
        raise UserError(
            f"{path}: has statistics of {listed(encoders)}, none of {distance!r}; {_FIX}"
        )
    return found[distance]


class _Arrays(NamedTuple):
    """The arrays of a file, checked."""

    path: Path
    names: list[str]
    array: Callable[[str], Any]

    def gaussian(self, pairs: tuple[tuple[str, str], ...]) -> Gaussian | None:
        """The first pair of mean and covariance that is there; None without any."""
        for mean_name, covariance_name in pairs:
            if mean_name in self.names or covariance_name in self.names:
                mean, covariance = self._numbers(mean_name), self._numbers(covariance_name)
                return self._checked(Gaussian(mean, covariance), mean_name, covariance_name)
        return None

    def _numbers(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise UserError(f"{self.path}: has no {name!r} beside {listed(self.names)}; {_FIX}")
        array = self.array(name)
        if array.ndim > 2 or any(n > MOST_FEATURES for n in array.shape):
            raise UserError(
                f"{self.path}: {name!r} has the shape {array.shape}, but statistics are of at most "
                f"{MOST_FEATURES} features; {_FIX}"
            )
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UserError(f"{self.path}: {name!r} must hold finite real numbers only; {_FIX}")
        return array.astype(np.float64)

    def _checked(self, gaussian: Gaussian, mean_name: str, covariance_name: str) -> Gaussian:
        mean, covariance = gaussian
        if mean.ndim != 1 or mean.size == 0 or covariance.shape != (mean.size, mean.size):
            raise UserError(
                f"{self.path}: {mean_name!r} and {covariance_name!r} have the shapes {mean.shape} "
                f"and {covariance.shape}, but must have [d] and [d, d]; {_FIX}"
            )
        with np.errstate(over="ignore"):  # infinite, then
            difference = np.abs(covariance - covariance.T).max()
        if difference > ASYMMETRY * np.abs(covariance).max():
            raise UserError(f"{self.path}: {covariance_name!r} is not symmetric; {_FIX}")
        if not _is_covariance(covariance):
            raise UserError(
                f"{self.path}: {covariance_name!r} is no covariance, for a variance is negative in "
                f"some direction; {_FIX}"
            )
        return gaussian

    def space(self) -> str:
        if SPACE not in self.names:
            return ""
        array = self.array(SPACE)
        # numpy takes any four bytes for a letter.
        if array.dtype.kind != "U" or array.ndim or not str(array).isascii():
            raise UserError(f"{self.path}: {SPACE!r} is no text; {_FIX}")
        return str(array)

    def rows(self, pool: Gaussian | None) -> np.ndarray | None:
        if pool is None or _ROWS not in self.names:
            return None
        array = self.array(_ROWS)
        right = array.dtype == np.float32 and array.shape[1:] == pool.mean.shape
        if not right or len(array) < _FEWEST:
            raise UserError(
                f"{self.path}: {_ROWS!r} is {array.dtype} {array.shape}, but must be float32 "
                f"[n, {pool.mean.size}], n at least {_FEWEST}; {_FIX}"
            )
        try:
            for _ in row_blocks(array, _ROWS, BLOCK_ROWS):
                pass
        except ValueError as error:
            raise UserError(f"{self.path}: {error}; {_FIX}") from None
        return array

    def images(self) -> np.ndarray | None:
        if _IMAGES not in self.names:
            return None
        array = self.array(_IMAGES)
        right = array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3
        if not right or len(array) < _FEWEST:
            raise UserError(
                f"{self.path}: {_IMAGES!r} is {array.dtype} {array.shape}, but must be uint8 "
                f"[n, h, w, 3], n at least {_FEWEST}; {_FIX}"
            )
        return array


def _is_covariance(matrix: np.ndarray) -> bool:
    """Returns whether a symmetric matrix is positive semidefinite, to the rounding of float32."""
    rounding = ASYMMETRY * np.trace(matrix) + np.finfo(np.float64).tiny
    try:
        np.linalg.cholesky(matrix + rounding * np.eye(len(matrix)))  # a tenth of eigenvalues' time
    except np.linalg.LinAlgError:
        return False
    return True
