"""Distances between sets of features, against SciPy's matrix square root and the papers' sums written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from jddim import images
from jddim.cli.main import main
from jddim.evaluate import metrics, mnist_cnn
from jddim.evaluate.metrics import Moments, frechet_distance, kernel_distance, precision_recall

pytestmark = pytest.mark.quick


def draw(seed: int, n: int, d: int = 7, *, shift: float = 0.0, rank: int | None = None) -> np.ndarray:
    """Correlated features, float64; of a smaller rank if asked."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((rank or d, d))
    return rng.standard_normal((n, rank or d)) @ mixing + shift


@pytest.mark.parametrize(("n", "rank"), [(50, None), (301, None), (5, None), (301, 3)])
def test_frechet_distance_is_the_formula(n: int, rank: int | None) -> None:
    a, b = draw(0, n, rank=rank), draw(1, n + 13, shift=0.4)
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # SciPy's root of the product itself; singular ones it does to half the digits
    root = scipy.linalg.sqrtm(c_a @ c_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c_a + c_b - 2 * root)
    singular = rank is not None or n < 8
    distance = frechet_distance(Moments.of(a), Moments.of(b))
    assert distance == pytest.approx(expected, rel=1e-5 if singular else 1e-10)
    # of singular ones, the root of eigenvalues that rounding made is 1e-8
    swapped = frechet_distance(Moments.of(b), Moments.of(a))
    assert distance == pytest.approx(swapped, rel=1e-7 if singular else 1e-10)


def test_frechet_distance_of_known_gaussians() -> None:
    d, n = 3, 11
    base = draw(2, n, d)
    assert frechet_distance(Moments.of(base), Moments.of(base)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(Moments.of(base), Moments.of(base + 2)) == pytest.approx(4 * d, rel=1e-12)
    # the same axes, three times as long: sum (3 s - s)^2 = 4 tr C, and the mean goes with it
    spread = 4 * np.trace(np.cov(base, rowvar=False)) + 4 * (base.mean(0) ** 2).sum()
    assert frechet_distance(Moments.of(base), Moments.of(3 * base)) == pytest.approx(spread, rel=1e-12)


def test_moments_come_batch_by_batch() -> None:
    x = draw(3, 500, shift=1e4)  # far from 0: sums of squares would cancel
    whole = Moments.of(x)
    batched = metrics.moments([x[:1], x[1:200], x[200:]], lambda batch: batch)
    assert batched.count == 500
    np.testing.assert_allclose(batched.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(batched.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    published = Moments.given(whole.mean, whole.covariance)
    assert frechet_distance(published, whole) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="of how many samples"):
        whole.merged(published)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    x, y = draw(4, 23), draw(5, 31, shift=0.3)
    kernel = lambda a, b: (a @ b / 7 + 1) ** 3  # noqa: E731

    def mmd(x, y):
        n = len(x)
        own = sum(kernel(v[i], v[j]) for v in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return own - 2 * np.mean([[kernel(a, b) for b in y] for a in x])

    rng = np.random.default_rng(9)
    expected = [mmd(x[rng.choice(23, 11, replace=False)], y[rng.choice(31, 11, replace=False)]) for _ in range(3)]
    mean, std = kernel_distance(x, y, subsets=3, subset_size=11, seed=9)
    assert mean == pytest.approx(np.mean(expected), rel=1e-10)
    assert std == pytest.approx(np.std(expected), rel=1e-10)


def test_kernel_distance_has_no_bias_and_the_frechet_distance_has() -> None:
    few, many = draw(6, 4000)[:40], draw(6, 4000)
    kernel = [kernel_distance(draw(6, 4000)[i : i + 40], many[2000:], subset_size=40)[0] for i in range(0, 2000, 40)]
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / np.sqrt(len(kernel))
    assert frechet_distance(Moments.of(few), Moments.of(many)) > 10 * frechet_distance(
        Moments.of(many[:2000]), Moments.of(many[2000:])
    )


def test_a_subset_that_is_all_there_is_has_no_deviation() -> None:
    mean, std = kernel_distance(draw(4, 23), draw(5, 23))
    assert np.isfinite(mean)
    assert np.isnan(std)


def test_precision_and_recall() -> None:
    real = np.random.default_rng(0).standard_normal((400, 2))
    one_side = real[real[:, 0] > 0][:150] + 1e-3
    precision, recall = precision_recall(real, one_side)
    assert precision > 0.95  # what is made is real
    assert 0.4 < recall < 0.75  # but half is missing
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    # By hand, k = 1: real 0, 1, 3 reach to 1, 1, 2; of made 0.5, 5.5, 9 the first is inside; they reach 5, 3.5, 3.5
    line = lambda *at: np.array(at)[:, None]  # noqa: E731
    assert precision_recall(line(0.0, 1, 3), line(0.5, 5.5, 9), k=1) == (1 / 3, 1.0)


def test_what_metrics_refuse() -> None:
    x = draw(0, 9)
    with pytest.raises(ValueError, match=r"features must be \(n, d\), got shape \(9,\)"):
        Moments.of(x[:, 0])
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.where(x > 1, np.nan, x))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(Moments.of(x[:1]), Moments.of(x))
    with pytest.raises(ValueError, match="of one kind, got 7 and 5"):
        frechet_distance(Moments.of(x), Moments.of(x[:, :5]))
    with pytest.raises(ValueError, match="more than 3 samples"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="no images"):
        metrics.moments([], lambda batch: batch)


def digits(seed: int, n: int) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).standard_normal((n, 28, 28, 1), dtype=np.float32), -1, 1)


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = digits(0, 21), digits(1, 30) * 0.5
    images.save_images(tmp_path / "a.npz", a, {})
    np.save(tmp_path / "b.npy", b)
    command = ["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npy")]
    assert main([*command, "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    params = mnist_cnn.load()
    made, real = (np.asarray(mnist_cnn.hidden(params, x)) for x in (images.from_uint8(images.to_uint8(a)), b))
    # features in float32, by batches of another size
    assert figures["frechet_distance"] == pytest.approx(frechet_distance(Moments.of(made), Moments.of(real)), rel=1e-4)
    assert (figures["images"], figures["reference"], figures["features"]) == (21, 30, "mnist-cnn-v1")
    printed = capsys.readouterr().out
    assert f"FD (mnist-cnn-v1)         {figures['frechet_distance']:.3f}" in printed
    assert "compare it at equal numbers only" in printed
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert main(["evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "a.npz")]) == 0
    assert "FD (mnist-cnn-v1)         0.000" in capsys.readouterr().out.replace("-0.000", "0.000")


def test_real_digits_are_nearer_to_real_digits_than_noise_is(mnist_images: Path) -> None:
    params = mnist_cnn.load()
    train, test = (mnist_cnn.read_mnist(mnist_images, part)[0][:1000] for part in ("train", "t10k"))
    reference = Moments.of(mnist_cnn.hidden(params, train))
    real = frechet_distance(Moments.of(mnist_cnn.hidden(params, test)), reference)
    blurred = frechet_distance(Moments.of(mnist_cnn.hidden(params, (test + np.roll(test, 2, 2)) / 2)), reference)
    noise = frechet_distance(Moments.of(mnist_cnn.hidden(params, digits(0, 1000))), reference)
    assert 5 * real < blurred < noise


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: np.save(path, np.zeros((3, 14, 14, 1), np.float32)), "looks at images of 28x28x1"),
        (lambda path: np.save(path, np.full((5, 28, 28, 1), np.nan, np.float32)), "a NaN or infinity in image 0"),
        (lambda path: path.write_text("x"), "holds no images"),
        (lambda path: None, "no such file"),
        (lambda path: np.save(path, digits(0, 3)), "more than 3 samples of each, got 3 and 3"),
    ],
)
def test_evaluate_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], said: str
) -> None:
    make(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", digits(1, 9))
    command = ["evaluate", str(tmp_path / "a.npy"), "--reference", str(tmp_path / "b.npy")]
    assert main([*command, "--json", str(tmp_path / "f.json")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize(("name", "said"), [("f.txt", "end it in .json"), ("folder.json", "is a folder")])
def test_evaluate_looks_at_its_output_first(tmp_path: Path, fails: Callable[..., str], name: str, said: str) -> None:
    (tmp_path / "folder.json").mkdir()
    absent = tmp_path / "never-read.npy"
    assert said in fails("evaluate", absent, "--reference", absent, "--json", tmp_path / name)


def test_evaluate_by_features_made_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    made, real = rng.standard_normal((23, 5)), rng.standard_normal((31, 5)) + 1
    np.save(tmp_path / "made.npy", made.astype(np.float32))
    np.save(tmp_path / "real.npy", real)
    np.savez(tmp_path / "stats.npz", mu=real.mean(axis=0), sigma=np.cov(real, rowvar=False))
    expected = frechet_distance(Moments.of(made), Moments.of(real))
    for reference, more in (("real.npy", {"kernel_distance", "precision"}), ("stats.npz", set())):
        words = ["evaluate", str(tmp_path / "made.npy"), "--reference", str(tmp_path / reference)]
        assert main([*words, "--features", "pool3", "--json", str(tmp_path / "f.json"), "--overwrite"]) == 0
        figures = json.loads((tmp_path / "f.json").read_text())
        assert figures["frechet_distance"] == pytest.approx(expected, rel=1e-5)  # made is float32
        assert more <= figures.keys()
        assert ("precision" in figures) is bool(more)
        assert f"FD (pool3)         {expected:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("images", "reference", "said"),
    [
        ("four.npy", "real.npy", "features must be (n, d), got shape (2, 3, 3, 1)"),
        ("stats.npz", "real.npy", "does not hold features (n, d) as .npy: an .npz with mu, sigma"),
        ("real.npy", "other.npz", "or .npz statistics, mu and sigma: an .npz with arr_0"),
        ("real.npy", "cut.npz", "does not hold features"),
        ("real.npy", "stats.npz", "statistics must be (d,) and (d, d), got shapes (5,) and (4, 4)"),
    ],
)
def test_what_are_no_features(
    tmp_path: Path, fails: Callable[..., str], images: str, reference: str, said: str
) -> None:
    np.save(tmp_path / "four.npy", np.zeros((2, 3, 3, 1)))
    np.save(tmp_path / "real.npy", np.ones((7, 5)))
    np.savez(tmp_path / "other.npz", np.zeros(3))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "stats.npz").read_bytes()[:-30])
    assert said in fails("evaluate", tmp_path / images, "--reference", tmp_path / reference, "--features", "pool3")
