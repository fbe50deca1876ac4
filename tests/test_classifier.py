"""Classifiers of noisy images: their config and checkpoint, and how they guide at every door of `DDIM`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZE, classifier_config, random_model, small_config, write_checkpoint, write_classifier

import jddim
from jddim import guidance, sampling
from jddim.checkpoint.folder import CheckpointError, load_metadata
from jddim.cli.main import main
from jddim.cli.options import CKPT
from jddim.config import ClassifierConfig, SamplerConfig, from_json, to_json
from jddim.images import read_metadata
from jddim.models import MODELS
from jddim.run.plan import Inputs, plan
from jddim.run.request import Request
from jddim.scale.sharding import Sharded, make_mesh
from jddim.schedule import linear_schedule, zero_terminal_snr
from jddim.train.task import Task

pytestmark = pytest.mark.unoptimised

NUM = 3
LABELS = np.array([3, 0, 1], np.int32)
X_T = jax.random.normal(jax.random.key(1), (NUM, *SIZE, 1))
NOISE = jax.random.normal(jax.random.key(2), (4, NUM, *SIZE, 1))
NARROW: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
CLASSES: dict[str, Any] = {"class_embedding": "learned", "num_classes": 4}
CLASSIFIER: Any = random_model(classifier_config())


def ddim_of(*, sampler: dict[str, Any] | None = None, **fields: Any) -> jddim.DDIM:
    own = {"num_steps": 4, "spacing": "linspace", "clip": True, **(sampler or {})}
    return jddim.DDIM(random_model(small_config(**(NARROW | fields))), linear_schedule(100), SamplerConfig(**own))


def by_hand(ddim: jddim.DDIM, labels: Any, scale: Any, **limits: Any) -> jax.Array:
    """The loop of `jddim.sampling` around the denoiser of `jddim.guidance`, t rescaled for both networks."""

    def run(model: Any, classifier: Any) -> jax.Array:
        times = ddim.sampler.timestep_scale
        denoise = lambda x_t, t: model(x_t, t * jnp.float32(times))  # noqa: E731
        logits = lambda x_t, t: classifier(x_t, t * jnp.float32(times))  # noqa: E731
        gradient = guidance.label_gradient(logits, jnp.asarray(labels), jnp.asarray(scale))
        kind = ddim.sampler.prediction_type
        guided = guidance.classifier_guided(denoise, gradient, ddim.schedule, prediction_type=kind, **limits)
        return sampling.sample_loop(guided, X_T, ddim.table(), eta=0.6, noise=NOISE)

    return jax.jit(run)(ddim.model, CLASSIFIER)


@pytest.mark.parametrize(
    ("sampler", "limits"),
    [
        ({"timestep_scale": 2.5}, {"clip_range": (-1.0, 1.0)}),
        ({"prediction_type": "v_prediction", "threshold_ratio": 0.9, "threshold_max": 2.0}, {"threshold": (0.9, 2.0)}),
    ],
)
def test_it_is_the_loop_around_the_guided_denoiser(sampler: dict[str, Any], limits: Any) -> None:
    """x0 is limited before the gradient, and not after; a scale an image."""
    ddim = ddim_of(sampler=sampler)
    scale = np.array([9.0, 0.0, 5.0], np.float32)
    given = {"x_T": X_T, "noise": NOISE, "eta": 0.6, "labels": LABELS, "classifier": CLASSIFIER}
    made = ddim.sample(classifier_scale=scale, **given)
    chex.assert_trees_all_close(made, by_hand(ddim, LABELS, scale, **limits), atol=1e-4)  # another program
    apart = jnp.abs(made - ddim.sample(classifier_scale=0.0, **given)).max((1, 2, 3))
    assert apart[1] == 0
    assert apart.min() == 0
    assert (apart[np.array([0, 2])] > 1e-3).all()


def test_in_batches_and_under_transformations() -> None:
    ddim = ddim_of(**CLASSES)
    given: dict[str, Any] = {"labels": LABELS, "classifier": CLASSIFIER, "eta": 0.5}
    whole = ddim.sample(7, NUM, classifier_scale=4.0, **given)
    chex.assert_trees_all_close(ddim.sample(7, NUM, classifier_scale=4.0, batch_size=2, **given), whole, atol=1e-5)
    scales = jnp.array([0.0, 4.0])

    @jax.jit
    def inside(classifier: Any, scales: jax.Array) -> jax.Array:
        def run(scale: jax.Array) -> jax.Array:
            return ddim.sample(7, NUM, classifier_scale=scale, **(given | {"classifier": classifier}))

        return jax.vmap(run)(scales)

    chex.assert_trees_all_close(inside(CLASSIFIER, scales)[1], whole, atol=1e-4)


def test_beside_classifier_free_guidance() -> None:
    """The gradient is added to what the other guidance predicts. A null label that is told is none of the classes."""
    ddim = ddim_of(class_embedding="learned", num_classes=5, sampler={"clip": False})
    pair = {"guidance_scale": 2.0, "null_label": 4}

    def run(model: Any, classifier: Any) -> jax.Array:
        denoise = guidance.classifier_free(guidance.label_pair(model, jnp.asarray(LABELS), 4), 2.0)
        gradient = guidance.label_gradient(classifier, jnp.asarray(LABELS), 3.0)
        return sampling.sample_loop(guidance.classifier_guided(denoise, gradient, ddim.schedule), X_T, ddim.table())

    made = ddim.sample(x_T=X_T, eta=0.0, labels=LABELS, classifier=CLASSIFIER, classifier_scale=3.0, **pair)
    chex.assert_trees_all_close(made, jax.jit(run)(ddim.model, CLASSIFIER), atol=1e-3, rtol=1e-3)


def test_a_solver_is_guided_too() -> None:
    ddim = ddim_of(sampler={"prediction_type": "v_prediction"})
    scale = np.array([5.0, 0.0, 0.0], np.float32)
    given: dict[str, Any] = {"labels": LABELS, "classifier": CLASSIFIER, "classifier_scale": scale}
    apart = jnp.abs(ddim.sample(x_T=X_T, method="dpm++2m", **given) - ddim.sample(x_T=X_T, method="dpm++2m"))
    assert apart[0].max() > 1e-3
    assert apart[1:].max() < 1e-5  # another program


def test_editing_and_inverting_are_guided_too() -> None:
    ddim = ddim_of(sampler={"clip": False, "prediction_type": "v_prediction"})
    given: dict[str, Any] = {"labels": LABELS, "classifier": CLASSIFIER, "classifier_scale": 2.0}
    images = jnp.clip(X_T, -1, 1)
    plain = ddim.edit(images, 0, strength=0.6, eta=0.0)
    assert jnp.abs(ddim.edit(images, 0, strength=0.6, eta=0.0, **given) - plain).max() > 1e-3
    x_T = ddim.invert(images, refine=20, **given)
    chex.assert_trees_all_close(ddim.sample(x_T=x_T, eta=0.0, **given), images, atol=1e-2)


@pytest.mark.parametrize(("convention", "clip"), [("paper", False), ("diffusers", True)])
def test_inversion_reads_a_prediction_at_the_rows_noise(convention: str, clip: bool) -> None:
    """Which may be another t's than the one that is asked, and none at all: a classifier of no weight does nothing."""
    ddim = ddim_of(sampler={"clip": clip, "prediction_type": "v_prediction", "rederive_eps": True})
    given: dict[str, Any] = {"convention": convention, "refine": 1}
    guided: dict[str, Any] = {"labels": LABELS, "classifier": CLASSIFIER, "classifier_scale": 0.0}
    images = jnp.clip(X_T, -1, 1)
    plain = ddim.invert(images, **given)
    chex.assert_trees_all_close(ddim.invert(images, **guided, **given), plain, atol=1e-4)  # another program
    guided["classifier_scale"] = 9.0
    assert jnp.abs(ddim.invert(images, **guided, **given) - plain).max() > 1e-3


def test_the_conventions_used_say_that_eps_is_rederived() -> None:
    """Where x0 is limited, and by DDIM; to ask for it is to ask for what happens."""
    inputs = Inputs(key=0, labels=LABELS, classifier=CLASSIFIER, classifier_scale=1.0)
    for asked, used in (
        (Request(clip=True), True),
        (Request(threshold=(0.9, 2.0), rederive_eps=True), True),
        (Request(clip=False), False),
        (Request(clip=False, rederive_eps=False), False),
        (Request(clip=True, method="dpm++2m"), False),
    ):
        assert plan(ddim_of(), asked, inputs).check("sample").sampler.rederive_eps is used


def test_labels_are_not_judged_by_what_is_no_classifier() -> None:
    for labels in ({"labels": LABELS}, {}):
        with pytest.raises(ValueError, match="got function") as caught:
            ddim_of().sample(0, NUM, classifier=lambda x_t, t: x_t, classifier_scale=1.0, **labels)
        assert "labels" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "asked", "told"),
    [
        ({}, {}, "classifier leads to labels: give labels, one for all or one an image, integers in 0..3"),
        (CLASSES, {}, "class-conditional: give labels, one for all or one an image, integers in 0..3"),
        ({}, {"labels": [0, 4, 1]}, "labels must lie in 0..3, got 4"),
        ({}, {"labels": LABELS, "classifier_scale": None}, "classifier_scale is needed beside a classifier"),
        (
            {},
            {"labels": LABELS, "classifier_scale": [1.0, 2.0]},
            r"scalar or one value per image \(3,\), got shape \(2",
        ),
        ({}, {"labels": LABELS, "classifier_scale": np.inf}, "classifier_scale must be finite, got inf"),
        ({}, {"classifier": None}, "classifier_scale is of a classifier: give classifier too, or leave it out"),
        ({}, {"classifier": "clf", "labels": None}, "classifier must be what jddim.load_classifier returns, got str"),
        (CLASSES | {"num_classes": 7}, {"labels": LABELS}, "tells 4 classes apart, and this network has 7: they have"),
        ({"class_embedding": "timestep"}, {"labels": LABELS}, "labels that are no classes .timestep embedding"),
        ({}, {"labels": LABELS, "image_size": (8, 8)}, "classifier looks at images of 6x10x1, these are 8x8x1"),
        ({"in_channels": 2, "out_channels": 2}, {"labels": LABELS}, "at images of 6x10x1, these are 6x10x2"),
        ({}, {"labels": LABELS, "method": "ddpm"}, r"condition_mean\), which is not built here: take method ddim"),
        ({}, {"labels": LABELS, "rederive_eps": False}, "rederive_eps is not False beside a classifier"),
        (
            CLASSES,
            {"labels": LABELS, "guidance": "cfg++", "guidance_scale": 0.5, "null_label": 3},
            "guidance cfg.. goes without a classifier",
        ),
    ],
)
def test_what_does_not_go_together(network: dict[str, Any], asked: dict[str, Any], told: str) -> None:
    asked = {"classifier": CLASSIFIER, "classifier_scale": 1.0} | asked
    if isinstance(asked.get("labels"), list):
        asked["labels"] = np.array(asked["labels"], np.int32)
    with pytest.raises(ValueError, match=told) as caught:
        ddim_of(**network).sample(0, NUM, eta=0.0, **asked)
    assert "\n" not in str(caught.value)


def test_more_that_is_refused() -> None:
    ddim = ddim_of(sampler={"prediction_type": "v_prediction"})
    ddim = dataclasses.replace(ddim, schedule=zero_terminal_snr(ddim.schedule))
    with pytest.raises(ValueError, match="tells nothing of x0 at alpha_bar 0, where this table starts"):
        ddim.sample(0, NUM, labels=LABELS, classifier=CLASSIFIER, classifier_scale=1.0)
    pooled: Any = random_model(classifier_config(pool="adaptive", channel_mults=(1, 1)))  # which takes other sizes
    with pytest.raises(ValueError, match="classifier: image size 3x10 does not divide"):
        ddim_of().sample(0, NUM, labels=LABELS, classifier=pooled, classifier_scale=1.0, image_size=(3, 10))
    with pytest.raises(ValueError, match=r"Classifier: x_t must be of 6x10 pixels, got \(3, 6, 8, 1\)"):
        CLASSIFIER(X_T[:, :, :8], jnp.zeros(NUM))
    with pytest.raises(ValueError, match="a classifier is not on the mesh"):
        Sharded(ddim_of(), make_mesh()).sample(0, NUM, classifier_scale=1.0)
    with pytest.raises(ValueError, match="unknown model type 'classifier'"):
        Task.from_json({"model": {"type": "classifier"}})


def test_a_null_label_is_no_class_of_the_classifiers() -> None:
    ddim = ddim_of(class_embedding="learned", num_classes=5)
    trained = load_null(ddim, 4)
    given: dict[str, Any] = {"classifier": CLASSIFIER, "classifier_scale": 1.0, "eta": 0.0, "steps": 1}
    assert trained.sample(0, NUM, labels=LABELS, **given).shape == (NUM, *SIZE, 1)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3, got 4"):
        trained.sample(0, NUM, labels=np.array([4, 0, 1], np.int32), **given)


def load_null(ddim: jddim.DDIM, null_label: int) -> jddim.DDIM:
    from jddim.checkpoint.metadata import Metadata
    from jddim.config import ScheduleConfig

    told = {"training": {"null_label": null_label}}
    return dataclasses.replace(
        ddim, metadata=Metadata(ddim.model.config, ScheduleConfig(), ddim.sampler, provenance=told)
    )


def test_the_config() -> None:
    config = classifier_config(channel_mults=(1, 2), attention_levels=(1,))
    assert from_json(ClassifierConfig, json.loads(json.dumps(to_json(config)))) == config
    assert "classifier" not in MODELS
    assert config.positions == 15
    assert config.summary == (
        "a classifier: 6x10x1, ch 8, mult 1,2, 1 block a level, attention at 3x5, attention pooling, 4 classes"
    )
    for wrong, told in (
        ({"num_classes": 0, "pool": "spatial"}, r"num_classes=0 must lie in 1\.\..*pool 'spatial' is unknown"),
        ({"head_channels": 0}, "head_channels=0 must be at least 1"),
        ({"channels": 2 * 10**6}, "beyond"),
        ({"image_size": (7, 10)}, "7x10 does not divide"),
    ):
        with pytest.raises(ValueError, match=told):
            dataclasses.replace(config, **wrong)
    with pytest.raises(ValueError, match="ClassifierConfig: num_classes must be int, got '4'"):
        from_json(ClassifierConfig, to_json(config) | {"num_classes": "4"})


def test_its_checkpoint(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "clf")
    loaded = jddim.load_classifier(path)
    logits = jax.jit(lambda classifier: classifier(X_T, jnp.array([0, 50, 99])))
    chex.assert_trees_all_equal(logits(loaded), logits(CLASSIFIER))
    half = jddim.load_classifier(path, dtype="bfloat16")
    assert jax.eval_shape(lambda classifier: classifier(X_T, jnp.zeros(NUM)), half).dtype == jnp.float32
    with pytest.raises(CheckpointError, match="is a classifier, which is not sampled but guides"):
        jddim.load(path)
    other = write_checkpoint(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="is no classifier, but a network to sample: 6x10x1"):
        jddim.load_classifier(other)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        jddim.load_classifier(path, dtype="float16")
    stored = path / "metadata" / "metadata"
    stored.write_text(stored.read_text().replace('"num_classes": 4', '"num_classes": true'))
    with pytest.raises(CheckpointError, match=r"metadata is damaged or edited .*num_classes must be int, got True"):
        load_metadata(path)


def test_the_help_says_what_names_a_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert f"with --classifier-scale; {CKPT}" in " ".join(capsys.readouterr().out.split())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", prediction_type="v_prediction")
    path = write_classifier(tmp_path / "clf")
    np.save(tmp_path / "x_T.npy", X_T)
    given = ["--classifier", str(path), "--classifier-scale", "3", "--labels", "3,0,1", "--steps", "2", "--eta", "0"]
    out = tmp_path / "out.npy"
    assert main(["sample", str(ckpt), str(out), "--x-T", str(tmp_path / "x_T.npy"), *given]) == 0
    options: dict[str, Any] = {"classifier": jddim.load_classifier(path), "classifier_scale": 3.0, "labels": LABELS}
    ddim = jddim.load(ckpt)
    np.testing.assert_array_equal(np.load(out), ddim.sample(x_T=X_T, steps=2, eta=0.0, **options))

    picture = tmp_path / "a.png"
    digest = jddim.checkpoint.folder.load_classifier_metadata(path).sha256  # type: ignore[attr-defined]
    images = str(tmp_path / "images.npy")
    np.save(images, np.load(out).clip(-1, 1))
    for command in (
        ["sample", str(ckpt), str(picture), "--num", "3"],
        ["edit", str(ckpt), images, str(picture), "--strength", "1"],
        ["interpolate", str(ckpt), str(picture), "--num", "3"],
    ):
        assert main([*command, *given, "--overwrite"]) == 0
        said = read_metadata(picture)
        assert said["classifier"] == {"file": "clf", "sha256": digest}
        assert said["classifier_scale"] == 3.0
    up = ["invert", str(ckpt), images, str(tmp_path / "up.npy"), "--reconstruct", str(picture)]
    assert main([*up, *given[:-2], "--overwrite"]) == 0
    assert read_metadata(picture)["classifier"]["sha256"] == digest
    np.testing.assert_array_equal(np.load(tmp_path / "up.npy"), ddim.invert(np.load(images), steps=2, **options))
    capsys.readouterr()
    assert main(["sample", str(ckpt), str(tmp_path / "c.png"), "--num", "3", "--batch-size", "auto", *given]) == 1
    assert "--batch-size auto tries the network alone, without a classifier" in capsys.readouterr().err
    assert main(["sample", str(ckpt), str(tmp_path / "c.png"), "--num", "3", *given[:2]]) == 1
    assert "--classifier-scale is needed beside a classifier, 1 for instance" in capsys.readouterr().err
    assert (
        main(["sample", str(ckpt), str(tmp_path / "c.png"), "--num", "3", "--classifier", str(ckpt), *given[2:]]) == 1
    )
    assert f"{ckpt} is no classifier, but a network to sample" in capsys.readouterr().err
    for command, why in (("bulk", "one checkpoint"), ("sweep", "one checkpoint"), ("export", "has one network")):
        for option in (given[:2], given[2:4]):
            with pytest.raises(SystemExit) as caught:
                main([command, str(ckpt), str(tmp_path / "d.png"), *option])
            assert caught.value.code == 2
            said_so = capsys.readouterr().err
            assert f"{option[0]} is not for jddim {command}" in said_so
            assert why in said_so
