"""Classifier guidance against guided-diffusion's own loop, whose results `make_source_golden.py` left in a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from source_cases import CLASSES, ETA, GUIDED_SETTINGS, SCALE, SOURCES, converted, drawn, filled, golden, images

from convert.families import FAMILIES
from jddim.models.building import build_model
from jddim.pipeline import DDIM
from jddim.schedule import make_schedule

pytestmark = pytest.mark.unoptimised

NAME = "attention, blocks resample"


@pytest.mark.parametrize("classes", [None, 7])
def test_the_sources_ddim_with_condition_score(classes: int | None) -> None:
    """Of a network with labels and of one without: t rescaled, a learned variance left out, x0 clipped before alone."""
    case, found = SOURCES["openai_classifier"][NAME], golden("openai_classifier")
    shapes = json.loads(str(found[f"{NAME}/{classes} classes/shapes"]))
    plan, params = filled(FAMILIES["openai"], {n: drawn(n, tuple(s)) for n, s in shapes.items()}, GUIDED_SETTINGS)
    ddim = DDIM(build_model(plan.model, params), make_schedule(plan.schedule), plan.sampler)
    classifier_plan, weights = converted("openai_classifier", NAME)
    num = len(CLASSES)
    given = {
        **{"labels": np.array(CLASSES, np.int32), "classifier": build_model(classifier_plan.model, weights)},
        **{"x_T": images(case, num, seed=2), "noise": images(case, ddim.sampler.num_steps, num, seed=3)},
    }
    for eta in (0.0, ETA):
        expected = found[f"{NAME}/{classes} classes/{eta}"]
        apart = [
            np.abs(np.asarray(ddim.sample(eta=eta, classifier_scale=scale, **given)) - expected).max()
            for scale in (SCALE, 0.0)
        ]
        # float32 through eight steps, and a gradient of the classifier in each; measured 1.1e-5
        assert apart[0] <= 1e-4 * np.abs(expected).max()
        assert apart[1] > 0.1
