"""One place for an option: each field of `Request` reaches every command, or is refused there with its reason."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import SIZE, write_checkpoint, write_classifier

import jddim
from jddim import config, pipeline
from jddim.checkpoint.folder import load_metadata
from jddim.cli.main import main
from jddim.images import save_images
from jddim.run import batches, methods, request
from jddim.run.plan import Inputs, Plan, plan
from jddim.run.request import COMMANDS, OWN, Request, options, taken_by

GUIDED = {"guidance_scale": 2.0, "null_label": 4}
VALUES: dict[str, tuple[Any, dict[str, Any]]] = {  # a value that changes something, and what has to stand beside it
    "method": ("dpm++2m", {}),
    "steps": (3, {}),
    "eta": (0.6, {}),
    "spacing": ("trailing", {}),
    "clip": (False, {}),
    "clip_range": ((-0.5, 0.75), {}),
    "threshold": ((0.9, 2.0), {}),
    "rederive_eps": (True, {}),
    "steps_offset": (1, {}),
    "set_alpha_to_one": (False, {}),
    "variance": ("fixed_large", {"method": "ddpm"}),
    "prediction_type": ("v_prediction", {}),
    "labels": ("2:4", {}),
    "guidance": ("projected", GUIDED),
    "guidance_scale": (2.0, {"null_label": 4}),
    "guidance_rescale": (0.5, GUIDED),
    "guidance_interval": ((200.0, 700.0), GUIDED),
    "guidance_channels": (1, GUIDED),
    "null_label": (3, {"guidance_scale": 2.0}),
    "reuse": (2, {}),
    "reuse_center": (1, {"reuse": 2}),
    "reuse_blocks": (2, {"reuse": 2}),
    "classifier_scale": (1.5, {}),
    "image_size": ((12, 6), {}),
    "dtype": ("bfloat16", {}),
    "seed": (7, {}),
    "start": (5, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("request")
    narrow: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
    sampler = {"spacing": "leading", "num_steps": 5, "clip": True, "eta": 0.3}
    write_checkpoint(folder / "ckpt", class_embedding="learned", num_classes=5, sampler=sampler, **narrow)
    write_classifier(folder / "clf", num_classes=5)
    save_images(folder / "x.npy", np.random.default_rng(0).uniform(-1, 1, (2, *SIZE, 1)).astype(np.float32), {})
    return folder


loaded, classifier = functools.cache(jddim.load), functools.cache(jddim.load_classifier)


def argv(command: str, folder: Path, asked: dict[str, Any]) -> list[str]:
    """The command with what is asked, in the words that the page would write."""
    ckpt, x, out = (str(folder / name) for name in ("ckpt", "x.npy", "out"))
    words = {
        "sample": [ckpt, f"{out}.npy", "--num", "2"],
        "bulk": [ckpt, f"{out}-set", "--num", "2", "--batch-size", "2"],
        "warmup": [ckpt, "--num", "2"],
        "sweep": [ckpt, f"{out}.npz", "--num", "2", "--eta", "0.3", "--steps", "5"],
        "edit": [ckpt, x, f"{out}.npy", "--strength", "1"],
        "interpolate": [ckpt, f"{out}.npz", "--num", "2"],
        "invert": [ckpt, x, f"{out}.npy"],
        "export": [ckpt, f"{out}.jddim"],
    }[command]
    if "labels" not in asked and "labels" in {o.name for o in taken_by(command)}:
        asked = {**asked, "labels": "1"}
    beside = ["--classifier", str(folder / "clf")] if "classifier_scale" in asked else []
    return [command, *words, *beside, *Request(**asked).words(command)]


def fingerprint(planned: Plan) -> str:
    """All that a plan's images depend on, but for a key's kind and the network's weights."""
    keys = planned.inputs.key
    told = {
        "program": planned.program,
        "arrays": [np.asarray(x).tolist() for x in (*planned.rows, *jax.tree.leaves(planned.limits))],
        "inputs": [
            None if x is None else np.asarray(x).tolist()
            for x in (planned.inputs.numbers, planned.inputs.labels, planned.inputs.eta, planned.inputs.guidance_scale)
        ],
        "classifier": (planned.inputs.classifier is None, str(planned.inputs.classifier_scale)),
        "guidance": (planned.null_label, planned.rescale, planned.interval),
        "rest": (planned.num, planned.shape, str(planned.model.dtype)),
        "key": None if keys is None or keys.ndim else jax.random.key_data(keys).tolist(),
    }
    return repr(told)


@pytest.fixture
def planned_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], Plan]:
    """The last plan that a command settles; nothing is compiled."""
    made: list[Plan] = []

    def check(planned: Plan, of: str) -> Plan:
        made.append(planned)
        return real_check(planned, of)

    def run(planned: Plan, **_: Any) -> Any:
        return np.zeros((planned.num, *planned.shape), np.float32), None

    class Enough(Exception):
        pass

    def stop(*_: Any, **__: Any) -> Any:
        raise Enough

    real_check = Plan.check
    monkeypatch.setattr(Plan, "check", check)
    monkeypatch.setattr(batches, "run", run)
    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(jddim, "load", loaded)
    monkeypatch.setattr("jddim.checkpoint.folder.load_metadata", functools.cache(load_metadata))
    monkeypatch.setattr("jddim.scale.export._shapes", stop)
    monkeypatch.setattr("jddim.bulk.run.run", stop)
    monkeypatch.setattr("jddim.cli.warmup._kept", lambda: True)

    def planned_by(command: str, asked: dict[str, Any]) -> Plan:
        made.clear()
        with contextlib.suppress(Enough):
            again = [] if command in ("bulk", "warmup") else ["--overwrite"]
            assert main([*argv(command, folder, asked), *again]) == 0
        return made[0] if command == "sweep" else made[-1]

    return planned_by


def expected(command: str, folder: Path, asked: dict[str, Any]) -> Plan:
    """The plan that Python makes of the same."""
    eta = {"invert": None, "edit": 0.0, "interpolate": 0.0}.get(command, 0.3)
    asked = {"labels": "1", "eta": eta, **asked}
    ddim = loaded(folder / "ckpt", dtype=asked.get("dtype", "float32"))
    key = None if command == "invert" else jax.random.key(asked.get("seed", 0))
    inputs = Inputs(key, classifier=classifier(folder / "clf") if "classifier_scale" in asked else None)
    num: int | None = 2
    if command in ("edit", "invert"):
        inputs, num = inputs._replace(images=np.load(folder / "x.npy")), None
    if command == "edit":
        asked["strength"] = 1.0
    if command in ("bulk", "export"):  # what is settled before anything is made
        num = 1
    if command == "export":
        asked["labels"] = "0"
    if methods.find(asked.get("method", "ddim")).takes_eta is False:
        asked.pop("eta", None)
    return plan(ddim, Request(**asked), inputs, num)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("serve", "page")])
def test_each_field_reaches_the_command_or_is_refused_with_its_reason(
    command: str, folder: Path, planned_by: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {o.name for o in options()} - VALUES.keys() == {
        *("strength", "resample", "jump_length", "paste", "convention", "refine"),
        *("latents", "decode_batch"),  # of a checkpoint with a first stage: test_latents
        *("shift", "rho", "s_churn", "s_tmin", "s_tmax", "s_noise"),  # of other paths: test_paths
    }
    base = fingerprint(planned_by(command, {}))
    assert base == fingerprint(expected(command, folder, {}))
    for name, (value, beside) in VALUES.items():
        option = next(o.option for o in options() if o.name == name)
        reason = option.left_out.get(command)
        if reason == OWN:
            continue
        if reason is not None:
            flags = Request(**{name: value}).words("sample")
            with pytest.raises(SystemExit) as ended:
                main([*argv(command, folder, {}), *flags])
            assert ended.value.code == 2
            assert reason in capsys.readouterr().err
            continue
        beside = {other: it for other, it in beside.items() if other in {o.name for o in taken_by(command)}}
        asked = {**beside, name: value}
        got = fingerprint(planned_by(command, asked))
        assert got == fingerprint(expected(command, folder, asked)), name
        assert got != fingerprint(expected(command, folder, beside)), name


def test_a_new_field_is_in_every_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = request._option(None, "--fresh", "something new", type=int, metavar="N")
    wider = dataclasses.make_dataclass("Request", [("fresh", int | None, fresh)], bases=(Request,), frozen=True)
    monkeypatch.setattr(request, "Request", wider)
    for command in COMMANDS[:-1]:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--fresh N" in capsys.readouterr().out, command


def test_python_takes_every_field_too() -> None:
    names = {o.name for o in options()}
    arrays = set(Inputs._fields) - {"key", "numbers", "images", "mask"}  # and a classifier
    ran = {"batch_size", "progress", "on_segment"}
    elsewhere = {
        "dtype",
        "seed",
        "strength",
        "resample",
        "jump_length",
        "paste",
        "convention",
        "refine",
    }  # of load, edit, invert
    assert set(pipeline.SampleOptions.__annotations__) == (names - elsewhere) | arrays | ran
    hints = typing.get_type_hints(Request)
    assert all(type(None) in typing.get_args(hints[o.name]) for o in options() if o.convention)


def test_the_command_lines_methods_are_the_registrys() -> None:
    assert methods.names() == config.METHODS


def test_a_request_goes_through_json_and_back() -> None:
    asked = Request(**{name: value for name, (value, _) in VALUES.items()})
    assert Request.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert Request().to_json() == {}
    with pytest.raises(ValueError, match=r"unknown key 'step'.*did you mean 'steps'"):
        Request.from_json({"step": 3})
    for wrong in ({"steps": "3"}, {"steps": True}, {"clip": 1}, {"clip_range": [1]}, {"method": None}):
        with pytest.raises(ValueError, match=f"Request: {next(iter(wrong))} must be"):
            Request.from_json(wrong)


def test_other_libraries_names_are_answered_with_ours() -> None:
    with pytest.raises(TypeError, match=r"sample\(\) takes no 'num_inference_steps' \(here it is 'steps'\)"):
        request.check_names({"num_inference_steps": 3}, ["steps"], "sample")
    with pytest.raises(TypeError, match="did you mean 'steps'"):
        request.check_names({"stesp": 3}, ["steps", "eta"], "sample")
