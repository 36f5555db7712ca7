"""Finding and reading pictures, the pass over them, and the benchmark's folders, scores and costs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from adfify import Moments, benchmark, demo, explaining, metrics, prediction
from adfify.errors import CheckpointError, DataError, InputError
from adfify.program import load, save


@pytest.fixture
def network() -> prediction.Classifier:
    return prediction.classifier(tiny.source())


def test_folders_are_searched_recursively_in_order_and_hidden_files_left_out(tmp_path):
    wanted = [tiny.picture(tmp_path / name) for name in ("a.JPG", "b/c.png", "b/d.webp")]
    for name in ("notes.txt", "._a.jpg", ".cache/e.png", "model.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    assert prediction.find_pictures([tmp_path]) == wanted


def test_a_named_file_is_taken_as_it_is(tmp_path):
    odd = tmp_path / "picture.unknown"
    assert prediction.find_pictures([odd, odd]) == [odd, odd]


def test_an_empty_folder_and_no_pictures_are_errors(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        prediction.find_pictures([tmp_path])
    with pytest.raises(DataError, match="no pictures"):
        prediction.find_pictures([])


def test_a_rotated_photograph_is_read_upright(tmp_path):
    upright = Image.new("RGB", (16, 16), "black")
    upright.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright, the sensor's rows are the picture's columns
    upright.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    upright.save(tmp_path / "plain.png")
    rotated, plain = (
        prediction.read_picture(tmp_path / name, tiny.PREPROCESSING) for name in ("photo.png", "plain.png")
    )
    torch.testing.assert_close(rotated, plain)
    assert plain[0, 0, 0] > plain[0, -1, 0]


def test_what_cant_be_read_is_named_with_its_reason(tmp_path):
    whole = tiny.picture(tmp_path / "whole.png", size=(200, 200)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    for name, reason in (("cut.png", "cut.png can't be read: "), ("text.jpg", "not a picture"), ("no.jpg", "no such")):
        with pytest.raises(DataError, match=reason) as caught:
            prediction.read_picture(tmp_path / name, tiny.PREPROCESSING)
        assert str(tmp_path / name) in str(caught.value)


def test_pixel_noise_is_carried_through_the_normalisation():
    source = tiny.source(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)))
    linear = source.model[1]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logits = prediction.classifier(source).logits(x, 0.01)
    per_channel = linear.weight.detach().double().view(4, 3, -1).square().sum(-1)
    std = torch.tensor([0.5, 0.25, 0.2], dtype=torch.float64)
    expected = (per_channel * 0.01 / std**2).sum(-1)
    torch.testing.assert_close(logits.variance.double(), expected.expand(2, 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variance", [-1.0, float("nan"), float("inf")])
def test_a_variance_that_is_none_is_refused(network, variance):
    with pytest.raises(InputError, match=str(variance)):
        network.logits(torch.zeros(1, 3, 16, 16), variance)


def test_predictions_come_in_order_and_best_first(network, tmp_path):
    paths = [tiny.picture(tmp_path / f"{seed}.png", seed) for seed in range(5)]
    (tmp_path / "2.png").write_text("broken")
    results = list(prediction.predict(network, paths, 1e-3, top=9, batch_size=2))
    assert {result.path for result in results} == set(paths)
    (broken,) = [result for result in results if isinstance(result, prediction.Unreadable)]
    assert broken.path.name == "2.png"
    good = [result for result in results if isinstance(result, prediction.Prediction)]
    assert [result.path for result in good] == [paths[i] for i in (0, 1, 3, 4)]
    x = torch.stack([prediction.read_picture(result.path, tiny.PREPROCESSING) for result in good])
    logits = network.logits(x, 1e-3)
    joint = network.joint(x, 1e-3, torch.arange(4).expand(4, -1))
    for row, result in enumerate(good):
        shares = [score.probability for score in result.top]
        assert len(shares) == 4
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        best = result.top[0]
        assert best.label == tiny.LABELS[best.index]
        assert best.mean == pytest.approx(joint.mean[row, best.index].item(), rel=1e-3)
        assert best.std == pytest.approx(joint.std[row, best.index].item(), rel=1e-3)
    (fast, *_) = prediction.predict(network, paths[:1], 1e-3, one_pass=True)
    assert fast.top[0].std == pytest.approx(logits.std[0, fast.top[0].index].item(), rel=1e-5)


def test_the_parts_of_an_explanation_sum_to_the_whole(network, tmp_path):
    (result,) = prediction.predict(network, [tiny.picture(tmp_path / "a.png")], 1e-2)
    found = explaining.explain(network, result, 1e-2)
    assert found.share.shape == (16, 16)
    assert float(found.share.sum()) == pytest.approx(1, abs=1e-4)
    assert sum(share for _, share in found.layers) == pytest.approx(1, abs=1e-4)
    assert [name for name, _ in found.layers] == [explaining.INPUT, "features.2"]
    assert explaining.draw(found, tmp_path / "why.png").stat().st_size > 10_000


def test_without_labels_outputs_are_numbered():
    network = prediction.classifier(tiny.source(labels=None))
    assert network.label(2) == "class 2"


def test_what_is_no_classifier_is_an_error():
    with pytest.raises(InputError, match="dict"):
        prediction.classifier(tiny.source(tiny.Segmenter())).logits(torch.zeros(1, 3, 16, 16), 1e-3)


def test_a_program_of_one_batch_size_takes_any_number_of_pictures(network, tmp_path):
    save(network.adf, tmp_path / "tiny.pt2", preprocessing=tiny.PREPROCESSING)
    program = load(tmp_path / "tiny.pt2")
    program.batch_size = 2  # as if the batch had been fixed
    given = []
    forward = program.forward

    def watched(x: Moments) -> Moments:
        given.append(len(x.mean))
        return forward(x)

    program.forward = watched
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    fixed = prediction.Classifier("tiny", "trained", program, tiny.PREPROCESSING, None).logits(x, 1e-3)
    assert given == [2, 2, 2]
    expected = network.logits(x, 1e-3)
    torch.testing.assert_close(fixed.mean, expected.mean)
    torch.testing.assert_close(fixed.variance, expected.variance)


# The benchmark


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["0", "3"], {"0": 0, "3": 3}),
        (["red_fox", "Tabby Cat", "tabby"], {"red_fox": 0, "Tabby Cat": 3, "tabby": 3}),
        (["holiday", "2024", "crane"], None),  # two outputs are called crane, there is no output 2024
    ],
)
def test_class_folders_are_matched(folders, expected):
    assert benchmark.class_indices(folders, tiny.LABELS, 4) == expected


def test_wordnet_ids_are_imagenets():
    assert benchmark.class_indices(["n01440764", "n02123045"], None, 1000) == {"n01440764": 0, "n02123045": 281}


def test_some_unknown_class_folders_are_an_error():
    with pytest.raises(DataError, match="holiday"):
        benchmark.class_indices(["tabby", "holiday"], tiny.LABELS, 4)


def test_a_limit_is_spread_over_the_folder(tmp_path):
    for name in itertools.product("abcd", range(5)):
        tiny.picture(tmp_path / name[0] / f"{name[1]}.png")
    assert benchmark.open_folder(tmp_path, 4).folders == ("a", "b", "c", "d")
    assert len(benchmark.open_folder(tmp_path, 100).paths) == 20
    tiny.picture(tmp_path / "loose.png")
    assert benchmark.open_folder(tmp_path).folders is None


def test_the_benchmarks_numbers_are_the_metrics_of_the_predictions(tmp_path):
    source = tiny.source()
    for label, seed in itertools.product(range(4), range(3)):
        tiny.picture(tmp_path / str(label) / f"{seed}.png", seed)
    (tmp_path / "0" / "broken.png").write_text("broken")
    seen: list[int] = []
    report = benchmark.evaluate(
        source, benchmark.open_folder(tmp_path), [0.0, 0.05], batch_size=1, progress=seen.append
    )  # one by one: the last bits of a sum depend on the batch, and would break the ties below
    assert (report.pictures, report.labelled, sum(seen)) == (12, True, 13)
    assert [unreadable.path.name for unreadable in report.unreadable] == ["broken.png"]
    plain, certain, noisy = report.rows
    assert plain.quality is not None
    # The same pictures stand in all four folders, so a quarter of the answers is right, whatever they are.
    assert plain.quality.accuracy == 0.25
    assert plain.quality.auroc_confidence == pytest.approx(0.5)
    paths = [tmp_path / "0" / f"{seed}.png" for seed in range(3)]
    x = torch.stack([prediction.read_picture(path, tiny.PREPROCESSING) for path in paths])
    with torch.inference_mode():
        p = source.model(x).double().softmax(-1)
    assert plain.quality.nll == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert plain.quality.ece == pytest.approx(p.amax(-1).mean().item() - 0.25, abs=1e-5)
    assert plain.quality.auroc_std is None
    assert certain.quality is not None
    assert certain.quality.nll == pytest.approx(plain.quality.nll, rel=1e-5)
    assert certain.mean_std == 0
    assert noisy.quality is not None
    assert noisy.quality.auroc_std == pytest.approx(0.5)
    logits = prediction.classifier(source).logits(x, 0.05)
    probabilities = metrics.expected_probabilities(logits)
    assert noisy.mean_entropy == pytest.approx(metrics.entropy(probabilities).mean().item(), rel=1e-5)
    best = logits.std.gather(1, probabilities.argmax(-1, keepdim=True))
    assert noisy.mean_std == pytest.approx(best.mean().item(), rel=1e-5)
    assert noisy.mean_entropy != pytest.approx(plain.mean_entropy, rel=0.01)
    assert (plain.agreement, certain.agreement) == (1, 1)


def test_a_benchmark_needs_one_readable_picture_and_the_original(tmp_path):
    (tmp_path / "broken.png").write_text("broken")
    with pytest.raises(DataError, match=r"broken\.png"):
        benchmark.evaluate(tiny.source(), benchmark.open_folder(tmp_path), [1e-3])
    with pytest.raises(DataError, match="nowhere"):
        benchmark.open_folder(Path("nowhere"))


def test_costs_are_ratios_of_interleaved_times(monkeypatch):
    clock, calls = 0.0, []

    def takes(name: str, seconds: float) -> None:
        nonlocal clock
        calls.append(name)
        clock += seconds * (10 if len(calls) in (7, 8) else 1)  # one disturbed round

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock)
    cost = benchmark.interleaved(lambda: takes("plain", 2.0), lambda: takes("adf", 6.0), 5)
    assert cost == benchmark.Cost(median=3.0, minimum=3.0, rounds=5)
    assert calls[2:6] == ["adf", "plain", "plain", "adf"]
    assert len(calls) == 12


# The demo, on a small network


def test_the_demo_compares_with_monte_carlo(tmp_path):
    paths = [tiny.picture(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    # One linear layer: the one-pass moments are exact, so Monte Carlo has to agree with them.
    source = tiny.source(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)))
    seen: list[int] = []
    result = demo.run(source, paths, draws=400, noise_variances=(1e-4, 1e-2), progress=seen.append)
    assert sum(seen) == demo.steps(3, 400, 2)
    for level in result.levels:
        assert level.std_ratio == pytest.approx(1, abs=0.15)
        assert level.joint_ratio == pytest.approx(1, abs=0.15)
        assert max(level.mean_error, level.joint_mean_error) < 0.2
        assert level.rank_logits > 0.7
    # Label and probability are those of the joint moments at the middle level.
    network = prediction.classifier(source)
    for row, (shown,) in enumerate(
        found.top for found in prediction.predict(network, paths, 1e-2) if isinstance(found, prediction.Prediction)
    ):
        assert result.labels[row] == shown.label
        assert float(result.probabilities[row]) == pytest.approx(shown.probability, rel=1e-5)
        assert float(result.middle.joint_mean[row]) == pytest.approx(shown.mean, rel=1e-5)
        assert float(result.middle.joint_std[row]) == pytest.approx(shown.std, rel=1e-5)
    low, high = (level.one_pass_std for level in result.levels)
    torch.testing.assert_close(high, low * 10, rtol=1e-4, atol=0)
    with torch.inference_mode():
        x = torch.stack([prediction.read_picture(path, tiny.PREPROCESSING) for path in paths])
        assert result.labels == tuple(tiny.LABELS[i] for i in source.model(x).argmax(-1))


def test_the_demo_says_which_extra_it_lacks(tmp_path, monkeypatch):
    result = demo.run(tiny.source(), [tiny.picture(tmp_path / "a.png")], draws=2)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(CheckpointError, match=r"adfify\[demo\]"):
        demo.draw(result, tmp_path / "demo.png")
