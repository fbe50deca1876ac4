"""scripts/cluster: manifests fit a small schema, `jddim bulk` takes what they ask, scripts run beside stand-ins."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from jddim.bulk.manifest import BulkConfig
from jddim.cli.main import _parser

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "scripts" / "cluster"
MANIFESTS = sorted(CLUSTER.glob("*.yaml"))
SCRIPTS = sorted(path for path in CLUSTER.iterdir() if path.suffix in (".sh", ".sbatch"))

# What the manifests use, and no more, of: JobSet v0.12.0, whose CRD serves jobset.x-k8s.io/v1alpha2 alone
# (config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml); batch/v1 and v1 of Kubernetes 1.31, where podFailurePolicy
# is stable. A name with "?" may be missing; a type, a value, or a function that says whether a value will do.
CONTAINER = {
    "name": str,
    "image": str,
    "workingDir?": str,
    "command": [str],
    "args?": [str],
    "resources": {"limits": lambda said: set(said) <= {"google.com/tpu", "nvidia.com/gpu"} and all(said.values())},
    "volumeMounts?": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": "Never",  # which podFailurePolicy needs
    "nodeSelector?": lambda said: all(
        re.fullmatch(r"cloud\.google\.com/gke-tpu-(accelerator|topology)", k) for k in said
    ),
    "containers": [CONTAINER],
    "volumes?": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB = {
    "completionMode": "Indexed",  # which sets JOB_COMPLETION_INDEX
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy?": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
        "name": lambda said: re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", said),
        "annotations?": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "failurePolicy?": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas?": int, "template": {"spec": JOB}}],
    },
}


def misfits(said: Any, schema: Any, where: str = "") -> list[str]:
    """Where `said` is not what the schema asks for."""
    if isinstance(schema, dict) and isinstance(said, dict):
        needed = {name.removesuffix("?"): asked for name, asked in schema.items()}
        found = [f"{where}.{name} is missing" for name in schema if not name.endswith("?") and name not in said]
        found += [f"{where}.{name} is unknown" for name in said if name not in needed]
        return found + [
            m for name in said if name in needed for m in misfits(said[name], needed[name], f"{where}.{name}")
        ]
    if isinstance(schema, list) and isinstance(said, list):
        found = [m for i, one in enumerate(said) for m in misfits(one, schema[0], f"{where}[{i}]")]
        return found if said else [f"{where} is empty"]
    if isinstance(schema, type):
        fits = type(said) is schema
    else:
        fits = bool(schema(said)) if callable(schema) else said == schema
    return [] if fits else [f"{where} is {said!r}"]


def jobs(path: Path) -> list[dict]:
    return [job["template"]["spec"] for job in yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]]


def asked(words: list[str]) -> Namespace:
    """The words of a `jddim bulk` as its own parser takes them; a set that `bulk` would begin."""
    assert words[0] == "bulk"
    args = _parser().parse_args(words)
    BulkConfig(args.num, batch_size=args.batch_size, shard_size=args.shard_size, format=args.format)
    return args


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schema_and_bulk_takes_their_command(path: Path) -> None:
    assert misfits(yaml.safe_load(path.read_text()), JOBSET) == []
    (job,) = jobs(path)
    (container,) = job["template"]["spec"]["containers"]
    assert job["completions"] == job["parallelism"]
    words = [*container["command"], *container["args"]]
    assert words[0] == "jddim"
    for i in range(job["completions"]):
        args = asked([word.replace("$(JOB_COMPLETION_INDEX)", str(i)) for word in words[1:]])
        assert args.distributed == "auto" or args.shard == (i, job["completions"])
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"]: container["workingDir"] for volume in job["template"]["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("v1alpha2", "v1alpha1", ".apiVersion is"),
        ("image:", "images:", "containers[0].image is missing"),
        ("backoffLimit: 0", "backofLimit: 0", "spec.backofLimit is unknown"),
        ("completions: 4", "completions: four", "completions is 'four'"),
        ('"50000"', "50000", "args[1] is 50000"),
        ("google.com/tpu:", "tpu:", "limits is"),
        ("name: jddim-tpu", "name: jddim_tpu", "metadata.name is"),
    ],
)
def test_the_schema_finds(old: str, new: str, said: str) -> None:
    text = (CLUSTER / "jobset-tpu.yaml").read_text()
    assert old in text
    found = misfits(yaml.safe_load(text.replace(old, new)), JOBSET)
    assert any(said in m for m in found), found


def test_a_slice_has_as_many_chips_as_its_hosts() -> None:
    (job,) = jobs(CLUSTER / "jobset-tpu.yaml")
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 16
    assert "v5litepod-16" in (CLUSTER / "tpu-vm.sh").read_text()


def test_the_image_is_made_of_what_is_there() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"EXTRA=(\w+)", text))
    tags = {tag for path in CLUSTER.iterdir() for tag in re.findall(r"REGISTRY/jddim:(\w+)", path.read_text())}
    assert named == tags <= extras.keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_the_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True, timeout=60)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A home with bin, whose commands note what they are asked in `asked`, and a virtual environment."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jddim" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "jddim" / ".venv" / "bin" / "activate").touch()
    return tmp_path


def stand_in(home: Path, name: str, does: str = "") -> None:
    path = home / "bin" / name
    path.write_text(f'#!{shutil.which("bash")}\nprintf "%s\\n" "{name} $*" >>"$HOME/asked"\n{does}\n')
    path.chmod(0o755)


def start(home: Path, *words: object, **settings: str) -> subprocess.Popen[str]:
    env = {"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin", **settings}
    return subprocess.Popen(["bash", *map(str, words)], env=env, text=True, stderr=subprocess.PIPE, cwd=home)


def noted(home: Path, until: str = "") -> list[str]:
    """What was asked, once a line that begins so is there."""
    end = time.monotonic() + 30
    while True:
        lines = (home / "asked").read_text().splitlines() if (home / "asked").exists() else []
        if not until or any(line.startswith(until) for line in lines) or time.monotonic() > end:
            return lines
        time.sleep(0.02)


TASK = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}


def test_the_batch_job_is_one_worker_and_ends_as_it_does(beside: Path) -> None:
    stand_in(beside, "jddim", "exit 3")
    job = start(beside, CLUSTER / "bulk.sbatch", **TASK)
    assert job.wait(30) == 3, job.stderr.read()
    (line,) = noted(beside)
    text = (CLUSTER / "bulk.sbatch").read_text()
    (last,) = re.findall(r"^#SBATCH --array=0-(\d+)$", text, re.M)
    assert asked(line.split()[1:]).shard == (2, int(last) + 1)
    first = text.index("\n#SBATCH")  # sbatch reads these lines up to the first that is another
    assert text[first:].lstrip("\n").rpartition("#SBATCH")[0].count("\n") == text.count("#SBATCH") - 1


def test_a_batch_job_that_is_stopped_goes_back_into_the_queue(beside: Path) -> None:
    stand_in(
        beside, "jddim", "trap 'kill $!; echo jddim was told >>\"$HOME/asked\"; exit 143' TERM; /bin/sleep 60 & wait"
    )
    stand_in(beside, "scontrol")
    stand_in(beside, "sleep")
    job = start(beside, CLUSTER / "bulk.sbatch", **TASK)
    noted(beside, "jddim bulk")
    job.send_signal(signal.SIGUSR1)  # out of time
    assert noted(beside, "scontrol")[1:] == ["scontrol requeue 4711"]
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)  # as Slurm then does, and on preemption
    assert job.wait(30) == 143, job.stderr.read()
    assert noted(beside)[2:] == ["jddim was told", "sleep 600"]


def test_the_slice_is_made_used_and_deleted(beside: Path) -> None:
    stand_in(beside, "gcloud", 'case "$*" in *describe*) echo ${STATE:-ACTIVE} ;; *" ssh "*) exit ${SSH:-0} ;; esac')
    stand_in(beside, "sleep", "exit 1")
    script = CLUSTER / "tpu-vm.sh"
    places = {"BUCKET": "gs://mine", "IMAGE": "mine/jddim:tpu", "ZONE": "z"}
    for settings, status, steps in [
        ({}, 0, ["create", "describe", "scp", "ssh", "delete"]),
        ({"SSH": "7"}, 7, ["create", "describe", "scp", "ssh", "delete"]),
        ({"STATE": "SUSPENDED"}, 1, ["create", "describe", "delete"]),
    ]:
        (beside / "asked").write_text("")
        job = start(beside, script, **places, **settings)
        assert job.wait(30) == status
        assert [line.split()[4] for line in noted(beside)] == steps
        assert ("no slice: SUSPENDED" in job.stderr.read()) == ("STATE" in settings)
    assert start(beside, script, BUCKET="gs://mine", IMAGE="mine/jddim:tpu").wait(30) != 0  # no ZONE


@pytest.mark.parametrize("status", [0, 5])
def test_a_host_brings_the_set_joins_and_takes_it_back(beside: Path, status: int) -> None:
    stand_in(beside, "gcloud", 'case "$*" in *" gs://mine/fifty "*) exit 1 ;; esac')  # the first time: not there
    stand_in(beside, "sudo", f"exit {status}")
    stand_in(beside, "sleep", "exit 1")  # the loop that copies every five minutes ends, and is not missed
    job = start(beside, CLUSTER / "tpu-host.sh", "gs://mine", "mine/jddim:tpu")
    assert job.wait(30) == status
    assert "the set begins anew" in job.stderr.read()
    (words,) = [line.partition("mine/jddim:tpu ")[2].split() for line in noted(beside) if line.startswith("sudo")]
    args = asked(words)
    assert args.distributed == "auto"
    moved = [line.split()[-2:] for line in noted(beside) if line.startswith("gcloud storage rsync")]
    ckpt, out = (f"{beside}/sets/{name}" for name in (args.ckpt, args.out))
    assert moved == [["gs://mine/cifar10", ckpt], ["gs://mine/fifty", out], [out, "gs://mine/fifty"]]
    hidden = re.compile("^\\..*")
    assert f"--exclude={hidden.pattern}" in noted(beside)[0]
    assert all(hidden.match(name) for name in (".lock", ".lock-0-of-4", ".shard-00003.1a.npz", ".shard-1.ab/0.png"))


def test_the_page_shows_each_file_and_no_other() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    shown = re.findall(r"^```\{literalinclude\} \.\./scripts/cluster/(\S+)$", page, re.M)
    assert sorted(shown) == sorted(path.name for path in CLUSTER.iterdir())
