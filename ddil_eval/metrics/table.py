"""The table of metrics. A metric is one row: a network that gives features, and what turns the features into a value.

Another package adds a row by an entry point of the group ``ddil.metrics``; the entry point's value is a ``Metric``.
"""

from __future__ import annotations

from math import inf

from ddil_core.support.registry import Registry
from ddil_eval.metrics.clip_embedding import CLIP_EMBEDDING
from ddil_eval.metrics.clip_score import CLIP_S12B, CLIP_S34B
from ddil_eval.metrics.dinov2 import DINOV2
from ddil_eval.metrics.efflite0 import EFFLITE0
from ddil_eval.metrics.gaussians_world import POINT_LIKELIHOOD, POINT_MODES, POINTS, ModesFound
from ddil_eval.metrics.hps import HPS
from ddil_eval.metrics.inception import INCEPTION, INCEPTION_PATCH
from ddil_eval.metrics.inception_pytorch import INCEPTION_PYTORCH
from ddil_eval.metrics.lpips_alexnet import LPIPS_ALEXNET
from ddil_eval.metrics.lpips_efflite0 import LPIPS_EFFLITE0
from ddil_eval.metrics.metric import Metric, Network
from ddil_eval.metrics.shapes_world import SHAPES_READER, SHAPES_SCORER
from ddil_eval.statistics import FrechetInfinity, FrechetReference
from ddil_eval.statistics.kernels import GaussianDiscrepancy, KernelDistance
from ddil_eval.statistics.neighbours import COLUMNS, Neighbours
from ddil_eval.statistics.points import EnergyDistance, SlicedWasserstein
from ddil_eval.statistics.vendi import Vendi


def _frechet(name: str, title: str, network: Network) -> Metric:
    return Metric(name, title, "lower", "set", network, statistic=FrechetReference, bounds=(0.0, inf))


def _neighbours(name: str, title: str) -> Metric:
    """One of the four shares of ``Neighbours`` (5 nearest neighbours) on Inception's features."""
    bounds = (0.0, inf if name == "density" else 1.0)
    column = COLUMNS.index(name)
    return Metric(name, title, "higher", "set", INCEPTION, Neighbours, column=column, bounds=bounds, rate=True)


def _cosine(name: str, title: str, network: Network) -> Metric:
    return Metric(name, title, "higher", "mean", network, bounds=(-1.0, 1.0))


def _diversity(name: str, title: str, network: Network) -> Metric:
    return Metric(name, title, "higher", "group", network, bounds=(0.0, inf))


def _vendi(name: str, title: str, network: Network) -> Metric:
    return Metric(name, title, "higher", "alone", network, statistic=Vendi, bounds=(1.0, inf))


METRICS: Registry[Metric] = Registry(
    "metric",
    "ddil.metrics",
    Metric,
    (
        # Heusel et al., 2017
        _frechet("fid", "Fréchet inception distance, clean-fid", INCEPTION),
        _frechet("fid_pytorch", "Fréchet inception distance, pytorch-fid", INCEPTION_PYTORCH),
        _frechet("patch_fid", "FID of centre patches, for a recipe that cuts patches", INCEPTION_PATCH),
        # Chong and Forsyth, 2020
        Metric(
            name="fid_infinity",
            title="FID∞: FID's limit for N → ∞",
            direction="lower",
            kind="set",
            network=INCEPTION,
            statistic=FrechetInfinity,
            bounds=(0.0, inf),
        ),
        # Bińkowski et al., 2018. KID is unbiased, so it may fall below 0.
        Metric(
            name="kid",
            title="kernel inception distance",
            direction="lower",
            kind="set",
            network=INCEPTION,
            statistic=KernelDistance,
        ),
        # Kynkäänniemi et al., 2019; Naeem et al., 2020
        _neighbours("precision", "precision: share of images near a reference image"),
        _neighbours("recall", "recall: share of reference images near an image"),
        _neighbours("density", "density: mean number of reference images near an image, over k"),
        _neighbours("coverage", "coverage: share of reference images that have an image near them"),
        # Stein et al., 2023
        _frechet("fd_dinov2", "Fréchet distance on DINOv2's features", DINOV2),
        # Jayasumana et al., 2024
        Metric(
            name="cmmd",
            title="CLIP maximum mean discrepancy, × 1,000",
            direction="lower",
            kind="set",
            network=CLIP_EMBEDDING,
            statistic=GaussianDiscrepancy,
            bounds=(0.0, inf),
        ),
        _cosine("clip_score", "CLIP score, ViT-g/14 s12b_b42k", CLIP_S12B),
        _cosine("clip_score_s34b", "CLIP score, ViT-g/14 s34b_b88k", CLIP_S34B),
        # Wu et al., 2023. Some tables print 100 × this cosine.
        _cosine("hps_v2", "human preference score v2", HPS),
        # Zhang et al., 2018
        _diversity("lpips_diversity", "mean LPIPS between the images of a prompt", LPIPS_ALEXNET),
        _diversity(
            "lpips_efflite0",
            "mean distance on EfficientNet-Lite0's layers between the images of a prompt",
            LPIPS_EFFLITE0,
        ),
        # Friedman and Dieng, 2023
        _vendi("vendi_dinov2", "Vendi score on DINOv2's features", DINOV2),
        _vendi("vendi_efflite0", "Vendi score on EfficientNet-Lite0's features", EFFLITE0),
        # Not FID: FID is defined on one Inception network. Do not compare the two.
        _frechet("fd_efflite0", "Fréchet distance on EfficientNet-Lite0's features", EFFLITE0),
        _cosine("clip_score_shapes", "CLIP score of the shapes world's scorer", SHAPES_SCORER),
        Metric(
            name="drawn_right",
            title="captions drawn exactly right",
            direction="higher",
            kind="mean",
            network=SHAPES_READER,
            bounds=(0.0, 1.0),
            rate=True,
        ),
        # Székely and Rizzo, 2013. It is unbiased, so it may fall below 0.
        Metric("energy_distance", "energy distance of points", "lower", "set", POINTS, EnergyDistance),
        # Bonneel et al., 2015
        Metric(
            name="sliced_wasserstein",
            title="sliced Wasserstein distance of points",
            direction="lower",
            kind="set",
            network=POINTS,
            statistic=SlicedWasserstein,
            bounds=(0.0, inf),
        ),
        Metric(
            name="modes_found",
            title="modes that at least half of their expected points reach",
            direction="higher",
            kind="alone",
            network=POINT_MODES,
            statistic=ModesFound,
            bounds=(0.0, 1.0),
        ),
        Metric("log_likelihood", "exact log-likelihood of points, in nats", "higher", "mean", POINT_LIKELIHOOD),
    ),
)
