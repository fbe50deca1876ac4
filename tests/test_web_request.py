"""What the page may ask for: every control's bounds, all mistakes in one answer, and nothing that names a file."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import SIZE, write_checkpoint

import jddim
from jddim.config import ScheduleConfig
from jddim.images import from_uint8
from jddim.pipeline import DDIM
from jddim.run.request import Request
from jddim.serve.request import (
    Bounds,
    Refused,
    etas_of,
    fields,
    labels_of,
    mask_of,
    parse,
    picture_of,
    run_of,
    spacings,
)
from jddim.serve.snippets import command, python
from jddim.timesteps import SPACINGS

PICTURE = np.random.default_rng(3).integers(0, 256, (*SIZE, 1), dtype=np.uint8)
FLAT = base64.b64encode(bytes(PICTURE.size)).decode()
MASK = np.tile(np.array([0, 255], np.uint8), 30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DDIM]:
    folder = tmp_path_factory.mktemp("served")
    classes = write_checkpoint(folder / "classes", class_embedding="learned", num_classes=5)
    return {"plain": jddim.load(write_checkpoint(folder / "plain")), "classes": jddim.load(classes)}


@pytest.mark.parametrize(
    ("name", "sampler", "offered"),
    [
        ("edm", {"spacing": "karras", "prediction_type": "edm"}, ("karras", "even", "exponential", "beta")),
        ("flow", {"spacing": "even", "prediction_type": "velocity"}, ("even",)),
        ("linear", {"spacing": "karras_rounded"}, ("karras_rounded", *SPACINGS)),
    ],
)
def test_timetables_are_the_schedules(
    name: str, sampler: dict[str, Any], offered: tuple[str, ...], tmp_path: Path
) -> None:
    """The page used to offer whole timesteps' alone, so nothing of a continuous t could be drawn."""
    path = write_checkpoint(tmp_path / "checkpoint", schedule=ScheduleConfig(name), sampler=sampler)
    served = {"it": jddim.load(path)}
    assert spacings(served["it"]) == offered
    asked = parse({"num": 1, "steps": 3}, served, {"it": ["ddim"]}, Bounds())
    assert asked.request.spacing == offered[0]
    assert run_of(asked, served["it"]).total == 3


def ask(served: dict[str, DDIM], **data: Any) -> Any:
    methods = {"plain": ["ddim", "heun"], "classes": ["ddim"]}
    return parse(json.loads(json.dumps(data)), served, methods, Bounds(steps=100, num=7))


def test_defaults_and_every_field(served: dict[str, DDIM]) -> None:
    plain = ask(served)
    assert (plain.checkpoint, plain.mode, plain.request.steps, plain.num, plain.label) == (
        "plain",
        "sample",
        20,
        4,
        None,
    )
    assert plain.request.spacing == "uniform"  # the checkpoint's own
    asked: dict[str, Any] = {
        "checkpoint": "classes",
        "mode": "strip",
        "method": "ddim",
        "steps": 9,
        "eta": 0.25,
        "spacing": "quad",
        "seed": 2**32 - 1,
        "seed_to": 3,
        "num": 4,
        "label": 4,
        "guidance_scale": 1.5,
        "null_label": 2,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    assert {"steps_offset", "set_alpha_to_one"} <= {field["name"] for field in fields()}
    got = ask(served, **asked).settings
    assert {name: got[name] for name in asked} == asked


def test_the_null_label_is_the_recorded_one(served: dict[str, DDIM]) -> None:
    metadata = served["classes"].metadata
    assert metadata is not None
    trained = dataclasses.replace(metadata, provenance=metadata.provenance | {"training": {"null_label": 3}})
    served = served | {"classes": dataclasses.replace(served["classes"], metadata=trained)}
    assert ask(served, checkpoint="classes", guidance_scale=2).request.null_label == 3
    assert ask(served, checkpoint="classes", guidance_scale=2, null_label=1).request.null_label == 1


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        ({"steps": 0}, {"steps": "must be a whole number in 1..100, got 0"}),
        ({"steps": 101}, {"steps": "must be a whole number in 1..100, got 101"}),
        ({"steps": 10**400}, {"steps": "got 1000"}),
        ({"steps": 2.5}, {"steps": "a whole number"}),
        ({"steps": "7"}, {"steps": "got '7'"}),
        ({"steps": True}, {"steps": "got True"}),
        ({"steps": None}, {"steps": "got nothing"}),
        ({"num": 8}, {"num": "1..7"}),
        ({"num": 1, "mode": "strip"}, {"num": "2..7"}),
        ({"eta": -0.1}, {"eta": "0..10"}),
        ({"eta": float("nan")}, {"eta": "got nan"}),
        ({"eta": float("inf")}, {"eta": "got inf"}),
        ({"eta": 9}, {"eta": "too large for this table"}),
        ({"eta": 0.5, "method": "heun"}, {"eta": "method heun takes none"}),
        ({"method": "heun", "mode": "slerp"}, {"method": "mode slerp is DDIM's"}),
        ({"method": "unipc"}, {"method": "one of ddim, heun; got 'unipc'"}),
        ({"seed": -1}, {"seed": "0..4294967295"}),
        ({"mode": "slerp", "seed_to": 2**32}, {"seed_to": "0..4294967295"}),
        ({"spacing": "../../etc/passwd"}, {"spacing": "one of uniform, linspace"}),
        ({"checkpoint": "/etc"}, {"checkpoint": "one of plain, classes; got '/etc'"}),
        ({"checkpoint": ["plain"]}, {"checkpoint": "one of plain"}),
        ({"label": 1}, {"label": "no classes"}),
        ({"guidance_scale": 2}, {"guidance_scale": "no classes"}),
        ({"checkpoint": "classes", "label": 5}, {"label": "0..4"}),
        ({"checkpoint": "classes", "guidance_scale": 101, "null_label": 4}, {"guidance_scale": "0..100"}),
        ({"checkpoint": "classes", "guidance_scale": 1}, {"null_label": "0..4, got nothing"}),
        ({"checkpoint": "classes", "guidance_scale": 1, "null_label": 5}, {"null_label": "0..4"}),
        ({"condition": FLAT}, {"condition": "given no picture beside x_t"}),
        ({"mode": "invert"}, {"picture": "6x10x1 bytes in base64, got nothing"}),
        ({"mode": "invert", "picture": "AAAA"}, {"picture": "got 3"}),
        ({"mode": "invert", "picture": "%"}, {"picture": "in base64"}),
        ({"mode": "walk"}, {"mode": "one of sample, strip, grid, slerp, corners, invert, inpaint"}),
        ({"mode": "corners", "corners": [1, 2, 3], "at": [0, 1]}, {"corners": "4 whole numbers in 0..4294967295"}),
        ({"mode": "corners", "corners": [1, 2, 3, 2**32], "at": [0, 1]}, {"corners": "got [1, 2, 3, 4294967296]"}),
        ({"mode": "corners", "corners": [1, 2, 3, 4], "at": [0, 1.5]}, {"at": "2 numbers in 0..1, got [0, 1.5]"}),
        ({"mode": "corners", "corners": [1, 2, 3, 4], "at": [0, float("nan")]}, {"at": "got [0, nan]"}),
        ({"mode": "grid"}, {"columns": "1 to 6 whole numbers in 1..100, got nothing"}),
        ({"mode": "grid", "columns": [5, 101]}, {"columns": "got [5, 101]"}),
        ({"mode": "grid", "columns": [5, True]}, {"columns": "got [5, True]"}),
        ({"mode": "grid", "columns": "5, x"}, {"columns": "got '5, x'"}),
        ({"mode": "grid", "columns": [1] * 7}, {"columns": "1 to 6"}),
        ({"mode": "grid", "columns": [5, 61], "spacing": "trailing"}, {"steps": "61"}),
        ({"mode": "strip", "checkpoint": "classes", "label": "each"}, {"label": "0..4, got 'each'"}),
        ({"mode": "slerp", "checkpoint": "classes", "label": "each"}, {"label": "0..4, got 'each'"}),
        ({"mode": "invert", "checkpoint": "classes", "label": "each", "picture": FLAT}, {"label": "0..4, got 'each'"}),
        ({"spacing": "trailing", "steps": 61}, {"steps": "61"}),  # for which diffusers has no table
        ({"spacing": "uniform", "steps": 99}, {"steps": "uniform makes 100 steps"}),
        ({"step": 3}, {"'step'": "did you mean 'steps'?"}),
        ({"steps_offset": "1"}, {"steps_offset": "must be a whole number, got '1'"}),
        ({"set_alpha_to_one": 1}, {"set_alpha_to_one": "must be true or false, got 1"}),
        ({"clip_range": [1, 2, 3]}, {"clip_range": "must be a pair of numbers"}),
        ({"rederive_eps": True}, {"'rederive_eps'": "give it to jddim serve"}),
        ({"steps": 0, "num": 0, "seed": "x"}, {"steps": "got 0", "num": "got 0", "seed": "got 'x'"}),
    ],
)
def test_what_is_refused(served: dict[str, DDIM], data: dict[str, Any], problems: dict[str, str]) -> None:
    if data.get("spacing") == "uniform":  # 1000 // 99 = 10: a stride that makes 100
        bounds = Bounds(steps=99)
        with pytest.raises(Refused) as caught:
            parse(data, served, {"plain": ["ddim"], "classes": ["ddim"]}, bounds)
    else:
        with pytest.raises(Refused) as caught:
            run_of(ask(served, **data), served["plain"])
    assert caught.value.fields.keys() == problems.keys()
    for name, part in problems.items():
        assert part in caught.value.fields[name]
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("data", [None, [], 3, "x"])
def test_what_is_no_object(served: dict[str, DDIM], data: Any) -> None:
    with pytest.raises(Refused, match="must be a JSON object"):
        parse(data, served, {"plain": ["ddim"], "classes": ["ddim"]}, Bounds())


def test_what_a_request_means(served: dict[str, DDIM]) -> None:
    text = base64.b64encode(PICTURE.tobytes()).decode()
    mask = base64.b64encode(MASK.tobytes()).decode()
    asked = ask(served, mode="inpaint", picture=text, mask=mask, num=3)
    np.testing.assert_array_equal(picture_of(asked, served["plain"]), from_uint8(PICTURE))
    np.testing.assert_array_equal(mask_of(asked, served["plain"]).ravel(), MASK / 127.5 - 1)  # white is made anew
    with pytest.raises(Refused, match="mask: is empty"):
        ask(served, mode="inpaint", picture=text, mask=base64.b64encode(bytes(60)).decode())
    np.testing.assert_array_equal(etas_of(ask(served, mode="strip", num=3)), [0, 0.5, 1])
    np.testing.assert_array_equal(etas_of(ask(served, mode="invert", picture=text, num=3)), [0, 0.5, 1])
    np.testing.assert_array_equal(etas_of(ask(served, mode="invert", picture=text, num=1)), [0])
    each = ask(served, checkpoint="classes", label="each", num=7)
    np.testing.assert_array_equal(labels_of(each, range(5)), [0, 1, 2, 3, 4, 0, 1])
    one = ask(served, checkpoint="classes", label=3, num=2)
    np.testing.assert_array_equal(labels_of(one, range(5)), [3, 3])


def test_what_the_page_was_started_with_is_in_every_run(served: dict[str, DDIM]) -> None:
    start = Request(clip=True, guidance="projected", guidance_rescale=0.25, dtype="bfloat16")
    methods = {"plain": ["ddim"], "classes": ["ddim"]}
    plain = parse({"clip_range": [-0.5, 0.5]}, served, methods, Bounds(), start)
    assert (plain.request.clip, plain.request.clip_range, plain.request.guidance) == (True, (-0.5, 0.5), None)
    asked = {"checkpoint": "classes", "label": 1, "guidance_scale": 2.0, "null_label": 4}
    guided = parse(asked, served, methods, Bounds(), start)
    assert (guided.request.guidance, guided.request.guidance_rescale) == ("projected", 0.25)
    run = run_of(guided, served["classes"])
    assert (run.plan.program.guidance, run.plan.rescale) == ("projected", 0.25)
    program = python(guided, served["classes"], "classes")
    assert 'jddim.load("classes", dtype="bfloat16")' in program
    assert all(word in program for word in ("clip=True", 'guidance="projected"', "guidance_rescale=0.25"))
    words = command(guided, served["classes"], "classes")[0]
    assert words is not None
    assert all(
        word in words for word in ("--clip", "--guidance projected", "--guidance-rescale 0.25", "--dtype bfloat16")
    )
    assert (guided.settings["clip"], guided.settings["dtype"]) == (True, "bfloat16")
