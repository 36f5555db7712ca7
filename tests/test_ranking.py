"""What `predict` shows of a picture belongs together: order, label and probability are those of the shown moments."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

from adfify import monte_carlo, prediction
from adfify.checkpoint import Source
from adfify.gaussian.competition import expected_softmax, log_sum
from adfify.preprocessing import Preprocessing

PLAIN = Preprocessing(input_size=(1, 4, 4), mean=(0.0,), std=(1.0,), crop_pct=1.0)


def random_covariance(size: int, std: float) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return root @ root.T / size * std**2


@pytest.mark.parametrize(("size", "std"), [(2, 1.0), (5, 3.0), (16, 3.0)])
def test_the_expected_softmax_is_monte_carlos(size, std):
    generator = torch.Generator().manual_seed(1)
    mean, covariance = torch.randn(size, generator=generator).double() * 2, random_covariance(size, std)
    noise = torch.randn(400_000, size, generator=generator, dtype=torch.float64)
    drawn = torch.softmax(mean + noise @ torch.linalg.cholesky(covariance).T, -1)
    found = expected_softmax(mean, covariance)
    error = (drawn.var(0) / len(drawn)).sqrt() + 5e-4
    assert ((found - drawn.mean(0)) / error).abs().max() < 4
    assert float(found.sum()) == pytest.approx(1)


def test_the_covariance_counts():
    """Two logits that move together don't exchange their places, two that move apart do."""
    mean = torch.tensor([1.0, 0.0])
    together = expected_softmax(mean, torch.full((2, 2), 9.0))
    torch.testing.assert_close(together, torch.softmax(mean.double(), 0))
    apart = expected_softmax(mean, torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))
    assert apart[0] < 0.6 < together[0]


def test_very_many_logits_are_no_more_work():
    mean, variance = torch.linspace(-3, 3, 1500), torch.rand(1500, generator=torch.Generator().manual_seed(0))
    found = expected_softmax(mean, torch.diag(variance))
    # Of many independent ones the sum hardly varies: each has its own mean of an exponential.
    expected = torch.softmax((mean + variance / 2).double(), 0)
    assert float(found.sum()) == pytest.approx(1)
    assert ((found - expected).abs() / expected).median() < 0.02


def test_certain_logits_have_their_softmax_and_infinite_ones_none():
    mean = torch.tensor([3.0, -1.0, 40.0])
    certain = expected_softmax(mean, torch.zeros(3, 3))
    torch.testing.assert_close(certain, torch.softmax(mean.double(), 0), rtol=1e-12, atol=0)
    assert expected_softmax(torch.tensor([1.0, torch.inf]), torch.eye(2)).isnan().all()


def test_the_sum_of_losers():
    mean, variance = torch.zeros(900), torch.linspace(0, 1, 900)
    drawn = torch.randn(2000, 900, generator=torch.Generator().manual_seed(0)) * variance.sqrt()
    total = torch.logsumexp(drawn.double(), 1)
    found, spread = log_sum(mean, variance)
    assert float(found) == pytest.approx(float(total.mean()), abs=4 * float(total.std()) / 2000**0.5 + 1e-3)
    assert float(spread.sqrt()) == pytest.approx(float(total.std()), rel=0.1)
    # One is itself, whatever its variance; certain ones have their sum; nothing overflows.
    assert log_sum(torch.tensor([3.0]), torch.tensor([1e4])) == (pytest.approx(3), pytest.approx(1e4))
    assert log_sum(torch.tensor([0.0, 0.0]), torch.zeros(2)) == (pytest.approx(0.6931472), 0)


class Crossing(nn.Module):
    """The first class' logit is relu(t), t the sum of 16 equal units; the second one's is always 3.

    Under noise of variance .02 on 16 pixels t has a std of 9.1 and relu(t) a mean of 3.6; the one pass, which takes the
    units as independent, has 2.3 and 0.9: it ranks the second class first.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.units = nn.Conv2d(1, 16, 4, bias=False)
        self.sum = nn.Linear(16, 1, bias=False)
        self.head = nn.Linear(1, classes)
        for weight in (self.units.weight, self.sum.weight):
            nn.init.ones_(weight)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -1.0)
        with torch.no_grad():
            self.head.weight[0] = 1.0
            self.head.bias[:2] = torch.tensor([0.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.sum(self.units(x).flatten(1))))


NOISE = 0.02


@pytest.fixture(params=[3, 100], ids=["few classes", "many classes"])
def model(request) -> nn.Module:
    return Crossing(request.param).eval()


@pytest.fixture
def shown(model, tmp_path):
    """The scores of a black picture."""
    network = prediction.classifier(Source("crossing", model, PLAIN, None, "trained"))
    Image.new("L", (4, 4)).save(tmp_path / "black.png")

    def scores(top: int, one_pass: bool = False) -> tuple[prediction.Score, ...]:
        (found,) = prediction.predict(network, [tmp_path / "black.png"], NOISE, top=top, one_pass=one_pass)
        assert isinstance(found, prediction.Prediction)
        return found.top

    return scores


@pytest.mark.parametrize("top", [1, 2, 3])
def test_order_and_label_are_those_of_the_shown_moments(model, shown, top):
    truth = monte_carlo(model, torch.zeros(1, 1, 4, 4), NOISE, draws=4000)
    scores = shown(top)
    assert [score.index for score in scores][:2] == [0, 1][:top]
    assert scores[0].mean == pytest.approx(float(truth.mean[0, 0]), abs=4 * float(truth.mean_error[0, 0]))
    assert [score.mean for score in scores] == sorted((score.mean for score in scores), reverse=True)
    fast = shown(top, one_pass=True)
    assert [score.index for score in fast][:2] == [1, 0][:top]
    assert [score.mean for score in fast] == sorted((score.mean for score in fast), reverse=True)


def test_the_probability_is_that_of_the_shown_moments(model, shown):
    """E[softmax] of two Gaussian logits beside certain ones, by Gauss-Hermite quadrature."""
    by_index = {score.index: score for score in shown(2)}
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    logit = torch.tensor(by_index[0].mean + by_index[0].std * nodes)
    others = torch.full((200, model.head.out_features - 1), -1.0).double()
    others[:, 0] = 3.0
    each = torch.softmax(torch.cat((logit.unsqueeze(1), others), 1), 1)
    expected = torch.tensor(weights / weights.sum()) @ each
    for index in (0, 1):
        assert by_index[index].probability == pytest.approx(float(expected[index]), abs=2e-3)


@pytest.mark.parametrize("one_pass", [True, False])
def test_outputs_that_are_probabilities_are_shown_as_they_are(model, tmp_path, one_pass):
    network = prediction.classifier(
        Source("softmaxed", nn.Sequential(model, nn.Softmax(1)).eval(), PLAIN, None, "trained")
    )
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    (found,) = prediction.predict(network, [tmp_path / "black.png"], NOISE, top=2, one_pass=one_pass)
    assert [score.probability for score in found.top] == pytest.approx([score.mean for score in found.top])


def test_the_network_is_run_picture_by_picture(tmp_path):
    """A progress bar moves with every picture: the second one's joint moments are not waited for."""
    network = prediction.classifier(tiny.source())
    asked = []
    joint = network.adf.joint
    network.adf.__dict__["joint"] = lambda x, **rest: asked.append(len(x.mean)) or joint(x, **rest)
    paths = [tiny.picture(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    results = prediction.predict(network, paths, 1e-3)
    for done in (1, 2, 3):
        next(results)
        assert asked == [1] * done
