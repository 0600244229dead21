"""Losses, gradients, curvature, bins, calibration and training, against PyTorch in float64."""

import itertools
from math import inf, log, nan, pi, sqrt

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal
from torch.func import grad, hessian

from llmbook.foundations.regression_vs_classification import figures, race
from llmbook.foundations.regression_vs_classification.bins import bin_of, centres, hl_gauss
from llmbook.foundations.regression_vs_classification.calibration import best_temperature, judge, overfit, reliability
from llmbook.foundations.regression_vs_classification.likelihoods import (
    as_target,
    categorical_nll,
    gaussian_nll,
    squared_error,
)
from llmbook.foundations.regression_vs_classification.logit_losses import LOSSES, at_margin, by_margin
from llmbook.foundations.regression_vs_classification.surface import BINARY, descend, mean_loss, quickest, sample
from llmbook.foundations.regression_vs_classification.two_heads import (
    NOISE,
    TwoHeads,
    draw_drivers,
    expected,
    swerve,
    train,
    true_density,
)

# Forward mode loads decompositions that PyTorch itself still compiles with its deprecated script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
sizes, seeds = st.integers(1, 7), st.integers(0, 2**16)
scales = st.sampled_from([0.1, 1.0, 5.0, 40.0])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distributions(rows, classes, seed):
    return randn(rows, classes, seed=seed).softmax(-1)


@given(st.lists(st.integers(0, 4), max_size=3), seeds, scales)
@settings(deadline=None, max_examples=60)
def test_the_gaussian_is_torchs(shape, seed, scale):
    mean, target, spread = (randn(*shape, seed=seed + i) for i in range(3))
    variance = (scale * spread).exp()
    for one in (variance, scale, torch.tensor(scale, dtype=torch.float64)):
        ours = gaussian_nll(mean, target, one)
        deviation = torch.as_tensor(one, dtype=torch.float64).sqrt()
        torch.testing.assert_close(ours, -Normal(mean, deviation).log_prob(target), rtol=1e-11, atol=1e-12)
    wide = variance.clamp(min=1e-6)  # F.gaussian_nll_loss clamps there
    theirs = F.gaussian_nll_loss(mean, target, wide, full=True, reduction="none")
    torch.testing.assert_close(gaussian_nll(mean, target, wide), theirs, **EXACT)


@given(sizes, seeds)
@settings(deadline=None, max_examples=40)
def test_mse_is_the_gaussian_of_variance_one_half(n, seed):
    mean, target = randn(n, seed=seed), randn(n, seed=seed + 1)
    constant = 0.5 * log(pi)
    torch.testing.assert_close(squared_error(mean, target) + constant, gaussian_nll(mean, target, 0.5), **EXACT)
    torch.testing.assert_close(squared_error(mean, target).mean(), F.mse_loss(mean, target), **EXACT)


def test_the_best_variance_is_the_mse():
    mean, target = randn(50), randn(50, seed=1)
    mse = F.mse_loss(mean, target)
    best = gaussian_nll(mean, target, mse).mean()
    torch.testing.assert_close(best, 0.5 * (1 + torch.log(2 * pi * mse)), **EXACT)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert gaussian_nll(mean, target, factor * mse).mean() > best


@given(sizes, sizes, seeds, scales)
@settings(deadline=None, max_examples=60)
def test_the_categorical_is_torchs(n, classes, seed, scale):
    z, soft = scale * randn(n, classes, seed=seed), distributions(n, classes, seed + 1)
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    ours = categorical_nll(z, labels)
    torch.testing.assert_close(ours, -Categorical(logits=z).log_prob(labels), **EXACT)
    torch.testing.assert_close(ours, F.cross_entropy(z, labels, reduction="none"), **EXACT)
    torch.testing.assert_close(categorical_nll(z, soft), F.cross_entropy(z, soft, reduction="none"), **EXACT)
    torch.testing.assert_close(ours, z.logsumexp(-1) - z.gather(-1, labels[:, None])[:, 0], rtol=1e-12, atol=1e-11)
    assert (ours >= 0).all()


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (0,)])
def test_any_leading_shape_also_none_and_empty(shape):
    z, labels = randn(*shape, 4), torch.zeros(shape, dtype=torch.long)
    assert categorical_nll(z, labels).shape == shape
    for loss in LOSSES.values():
        assert loss.value(z, as_target(labels, 4).double()).shape == shape
        assert loss.gradient(z, as_target(labels, 4).double()).shape == (*shape, 4)


def test_extreme_logits_are_finite_or_infinite_as_they_should_be():
    z = torch.tensor([[1e4, 0.0, -inf], [-1e4, 0.0, -inf]], dtype=torch.float64, requires_grad=True)
    loss = categorical_nll(z, torch.tensor([0, 0]))
    assert loss.tolist() == [0.0, 1e4]
    loss.sum().backward()
    assert z.grad.isfinite().all()
    assert categorical_nll(z.detach(), torch.tensor([2, 2])).tolist() == [inf, inf]


def test_half_precision_stays_what_it_is():
    z = randn(3, 4).bfloat16()
    assert categorical_nll(z, torch.tensor([0, 1, 2])).dtype == torch.bfloat16


@given(st.sampled_from(sorted(LOSSES)), sizes, seeds, scales)
@settings(deadline=None, max_examples=90)
def test_gradients_and_hessians_are_autograds(name, classes, seed, scale):
    loss, z, y = LOSSES[name], scale * randn(classes, seed=seed), distributions(1, classes, seed + 1)[0]
    torch.testing.assert_close(loss.gradient(z, y), grad(loss.value)(z, y), **EXACT)
    torch.testing.assert_close(loss.hessian(z, y), hessian(loss.value)(z, y), **EXACT)
    assert torch.autograd.gradcheck(lambda z: loss.value(z, y), z.clone().requires_grad_())


@given(sizes, sizes, seeds)
@settings(deadline=None, max_examples=30)
def test_the_squared_losses_are_torchs(n, classes, seed):
    z, y = randn(n, classes, seed=seed), distributions(n, classes, seed + 1)
    torch.testing.assert_close(LOSSES["MSE on probabilities"].value(z, y).mean(), F.mse_loss(z.softmax(-1), y), **EXACT)
    torch.testing.assert_close(LOSSES["MSE on logits"].value(z, y).mean(), F.mse_loss(z, y), **EXACT)
    p = z.softmax(-1)
    jacobians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    wanted = 2 * (jacobians @ (p - y)[..., None])[..., 0] / classes
    torch.testing.assert_close(LOSSES["MSE on probabilities"].gradient(z, y), wanted, **EXACT)


@given(sizes, seeds, scales)
@settings(deadline=None, max_examples=60)
def test_cross_entropy_is_convex(classes, seed, scale):
    z = scale * randn(classes, seed=seed)
    low = torch.linalg.eigvalsh(hessian(F.cross_entropy)(z, torch.tensor(0))).min()
    assert low > -1e-12
    assert torch.linalg.eigvalsh(LOSSES["cross-entropy"].hessian(z, z.softmax(-1))).min() > -1e-12


def test_mse_on_probabilities_is_not_convex():
    z, y = at_margin(3, -3.0)
    assert torch.linalg.eigvalsh(hessian(LOSSES["MSE on probabilities"].value)(z, y)).min() < -0.01
    middle = LOSSES["MSE on probabilities"].value(0 * z, y)
    ends = [LOSSES["MSE on probabilities"].value(scale * z, y) for scale in (1.0, -1.0)]
    assert LOSSES["MSE on logits"].hessian(z, y).equal(2 / 3 * torch.eye(3, dtype=torch.float64))
    assert middle != sum(ends) / 2


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_confidently_wrong_slopes(classes):
    for margin in (-6, -10, -14):
        z, y = at_margin(classes, margin)
        p = z.softmax(-1)[0]
        ce, brier, logit = (abs(loss.gradient(z, y)[0]) for loss in LOSSES.values())
        torch.testing.assert_close(ce, 1 - p, **EXACT)
        assert brier < 4.1 * p / classes  # 2p(e₀ − ⟨p, e⟩)/V, and the bracket tends to −2
        torch.testing.assert_close(logit, torch.tensor(2 * (1 - margin) / classes, dtype=torch.float64), **EXACT)
    values, slopes = by_margin("cross-entropy", 2, (-10.0, 10.0))
    assert values == pytest.approx([log(1 + 2.718281828459045**10), log(1 + 2.718281828459045**-10)])
    assert slopes[0] == pytest.approx(0, abs=1e-4)


def test_one_output_is_two_classes():
    z = 10 * randn(20)
    two = torch.stack([torch.zeros_like(z), z], -1)
    y = torch.arange(20) % 2
    torch.testing.assert_close(
        categorical_nll(two, y), F.binary_cross_entropy_with_logits(z, y.double(), reduction="none"), **EXACT
    )
    torch.testing.assert_close(BINARY["cross-entropy"].value(z, y.double()), categorical_nll(two, y), **EXACT)
    brier = LOSSES["MSE on probabilities"].value(two, as_target(y, 2).double())
    torch.testing.assert_close(BINARY["MSE on probabilities"].value(z, y.double()), brier, **EXACT)


@given(st.integers(1, 12), seeds, st.floats(0.02, 3))
@settings(deadline=None, max_examples=60)
def test_bins(count, seed, sigma):
    edges = torch.cat([torch.zeros(1), (0.1 + randn(count, seed=seed).abs()).cumsum(0)]).double() - 1
    values = edges[0] + (edges[-1] - edges[0]) * torch.rand(9, generator=torch.Generator().manual_seed(seed)).double()
    at = bin_of(values, edges)
    assert ((edges[at] <= values) & (values <= edges[at + 1])).all()
    assert bin_of(torch.tensor([-1e9, 1e9]).double(), edges).tolist() == [0, count - 1]
    rows = hl_gauss(values, edges, sigma)
    assert (rows >= 0).all()
    for value, row in zip(values, rows, strict=True):
        normal = Normal(value, torch.tensor(sigma, dtype=torch.float64))
        mass = normal.cdf(edges).diff()
        torch.testing.assert_close(row, mass / mass.sum(), rtol=1e-9, atol=1e-9)
    assert (centres(edges) > edges[:-1]).all()


def test_a_value_on_an_inner_edge_belongs_to_its_right():
    edges = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert bin_of(edges, edges).tolist() == [0, 1, 2, 2]


def test_fine_bins_give_the_value_back():
    edges, values = torch.linspace(-3, 3, 121).double(), torch.tensor([-1.0, 0.013, 0.7]).double()
    torch.testing.assert_close(expected(hl_gauss(values, edges, 0.1), edges), values, rtol=0, atol=1e-6)


def test_cross_entropy_over_bins_is_a_density_less_the_bins_width():
    edges, y = torch.linspace(-6, 6, 2401).double(), randn(400)
    mass = Normal(0.0, 1.0).cdf(edges).diff()
    per_bin = categorical_nll(mass.log().expand(400, -1), bin_of(y, edges)) + log(edges[1] - edges[0])
    torch.testing.assert_close(per_bin, gaussian_nll(torch.zeros_like(y), y, 1.0), rtol=0, atol=0.02)


def test_reliability_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.35, 0.65], [1.0, 0.0]])
    found = reliability(p, torch.tensor([0, 1, 1, 0]))
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 3]
    assert found.accuracy[9] == pytest.approx(2 / 3)
    assert found.confidence[6] == pytest.approx(0.65)
    assert found.ece == pytest.approx((3 * abs(2 / 3 - 0.95) + 0.35) / 4, abs=1e-6)


@given(seeds, st.sampled_from([0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=5)
def test_labels_drawn_from_the_probabilities_are_calibrated(seed, scale):
    p = (scale * randn(40_000, 3, seed=seed)).softmax(-1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed + 7919))[:, 0]
    assert reliability(p, labels).ece < 0.015
    assert best_temperature(4 * p.log(), labels) == pytest.approx(4, rel=0.06)


def test_the_temperature_is_where_the_loss_is_flat():
    z, labels = 3 * randn(300, 4), torch.arange(300) % 4
    z[range(300), labels] += 2
    t = best_temperature(z, labels)
    best = F.cross_entropy(z / t, labels)
    assert all(F.cross_entropy(z / (t * f), labels) > best for f in (0.9, 0.999, 1.001, 1.1))


def test_longer_training_is_surer_and_not_righter():
    early, late = (judge(overfit((20, 200))[step], fitted=False) for step in (20, 200))
    mended = judge(overfit((20, 200))[200], fitted=True)
    assert late[2].ece > 0.15 > 0.05 > early[2].ece
    assert late[1] == mended[1] < early[1]
    assert mended[2].ece < late[2].ece / 3


def test_the_value_head_goes_between_and_the_bins_keep_both():
    edges, grid = torch.linspace(-1.4, 1.4, 29).double(), torch.tensor([[0.0], [0.55]]).double()
    x, y = draw_drivers(1000, 3)
    done = train(x, y, edges, grid, (0, 150))[150]
    sides = [float(done.p[1][(centres(edges) - side).abs() < 0.3].sum()) for side in (-1, 0, 1)]
    assert sides[0] > 0.25
    assert sides[2] > 0.45
    assert sides[1] < 0.02
    assert abs(done.mean[1]) < 0.5
    assert abs(expected(done.p, edges)[1]) < 0.5
    assert train(x, y, edges, grid, (0,))[0].cross_entropy == pytest.approx(log(28), abs=0.4)


def test_both_heads_send_their_gradient_to_one_trunk():
    model = TwoHeads(5).double()
    mean, logits = model(randn(6, 1))
    value = torch.autograd.grad(mean.sum(), model.trunk[0].weight, retain_graph=True)[0]
    bins = torch.autograd.grad(logits[:, 0].sum(), model.trunk[0].weight)[0]
    assert value.abs().max() > 0
    assert bins.abs().max() > 0


def test_the_true_density_is_one_and_the_drivers_follow_it():
    y, x = torch.linspace(-2, 2, 4001).double(), torch.tensor([0.0, 0.3, 0.55]).double()
    density = true_density(x, y)
    torch.testing.assert_close(torch.trapezoid(density, y), torch.ones(3).double(), rtol=0, atol=1e-9)
    mean = torch.trapezoid(density * y, y)
    torch.testing.assert_close(mean, 0.2 * swerve(x), rtol=0, atol=1e-9)
    at, offset = draw_drivers(20_000, 1)
    off = (offset.abs() - swerve(at[:, 0]))[swerve(at[:, 0]) > 0.5]
    assert off.std() == pytest.approx(NOISE, rel=0.05)
    assert (offset[(at[:, 0] - 0.55).abs() < 0.1] > 0).double().mean() == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("name", BINARY)
def test_descent_is_torchs_sgd(name):
    x, labels = sample()
    path = descend(name, (-2.0, 1.0), (0.1, 0.2), 5, x, labels)
    for column, rate in enumerate((0.1, 0.2)):
        weights = torch.tensor([-2.0, 1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weights], lr=rate)
        for step in range(6):
            torch.testing.assert_close(path.weights[step, column], weights.detach(), **EXACT)
            loss = mean_loss(name, weights, x, labels)
            torch.testing.assert_close(path.losses[step, column], loss.detach(), **EXACT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_the_best_rate_is_the_quickest():
    x, labels = sample()
    rate, path = quickest("MSE on logits", (-5.0, 3.0), (0.0625, 0.25, 64.0), 100, x, labels)
    assert rate == 0.25  # 64 diverges
    design = torch.stack([x, torch.ones_like(x)], -1)
    exact = torch.linalg.lstsq(design, labels[:, None]).solution[:, 0]
    torch.testing.assert_close(path.weights[-1], exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", race.RATES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_race_trains_as_torch_would(loss, optimizer):
    x, labels = race.problem(2)
    weights, rate = race.fresh(2), 0.05
    ours = race.run(loss, optimizer, weights, x, labels, (0.01, rate), 4)
    module = [p[1].clone().requires_grad_() for p in weights]
    make = torch.optim.SGD if optimizer == "gradient descent" else torch.optim.Adam
    theirs = make(module, lr=rate)
    hot = F.one_hot(labels, 10).double()
    for step in range(5):
        z = race.features_and_logits(module, x[1])[1]
        assert ours.accuracy[step, 1, 1] == (z.argmax(-1) == labels).double().mean()
        value = {
            "cross-entropy": lambda z: F.cross_entropy(z, labels),
            "MSE on probabilities": lambda z: F.mse_loss(z.softmax(-1), hot),
            "MSE on logits": lambda z: F.mse_loss(z, hot),
        }[loss](z)
        theirs.zero_grad()
        value.backward()
        theirs.step()
    for mine, exact in zip(ours.weights, module, strict=True):
        torch.testing.assert_close(mine[1, 1], exact.detach(), rtol=1e-9, atol=1e-9)


def test_a_race_of_another_size_is_run_as_asked():
    runs = race.everything(2, 3, starts=race.STARTS[1:], examples=20, width=5)
    assert {start for start, _, _ in runs} == {"confidently wrong"}
    assert len(runs) == 6
    one = runs["confidently wrong", "Adam", "MSE on logits"]
    assert one.accuracy.shape == (4, 2, 5)
    assert one.weights[0].shape == (2, 5, 8, 5)


def test_steps_are_counted_from_the_first_hit():
    accuracy = torch.tensor([[0.1, 0.1], [0.96, 0.2], [0.5, 0.3], [0.97, 0.4]])[:, :, None]
    made = race.Race(accuracy, (1.0,), [])
    assert made.steps_to(0.95).tolist() == [[1], [race.NEVER]]


def test_confidently_wrong_is_what_it_says_and_slows_mse_down():
    x, labels = race.problem(3)
    start = race.confidently_wrong(race.fresh(3), x, labels)
    p = race.features_and_logits(start, x)[1].softmax(-1)
    assert p[:, range(100), labels].median() < 1e-3
    needed = {}
    for loss in ("cross-entropy", "MSE on probabilities"):
        run = race.run(loss, "gradient descent", start, x, labels, race.RATES["gradient descent"][loss], 120)
        needed[loss] = run.steps_to(0.95)[:, run.best(0.95)].median()
    assert needed["MSE on probabilities"] > 3 * needed["cross-entropy"]


@pytest.mark.parametrize(("call", "words"), [
    (lambda: squared_error(randn(8), randn(8, 1)), r"\[8\] and target \[8, 1\] would broadcast to \[8, 8\]"),
    (lambda: squared_error(randn(8), randn(1)), r"would broadcast to \[8\]"),
    (lambda: squared_error(randn(8), randn(7)), "do not match"),
    (lambda: gaussian_nll(randn(3), randn(3), -1.0), "must be positive, but one is -1: let the network"),
    (lambda: gaussian_nll(randn(3), randn(3), torch.tensor([1.0, 0.0, 2.0])), "must be positive"),
    (lambda: gaussian_nll(randn(1), randn(1), nan), "must be positive, but one is nan"),
    (lambda: gaussian_nll(randn(3), randn(3), torch.ones(3, 1)), "would broadcast"),
    (lambda: categorical_nll(randn(2, 3), torch.tensor([0, 3])), "label 3 is outside 0 … 2"),
    (lambda: categorical_nll(randn(2, 3), torch.tensor([-100, 1])), "label -100 is outside 0 … 2: drop masked"),
    (lambda: categorical_nll(randn(2, 3), torch.tensor([0, 1, 2])), "do not match"),
    (lambda: categorical_nll(randn(2, 3), torch.tensor([[0], [1]])), r"would broadcast to \[2, 2, 3\]"),
    (lambda: categorical_nll(randn(2, 3), torch.tensor([0.0, 1.0])), "class ids should be integers"),
    (lambda: as_target(torch.tensor([[0.0, 1.0, 1.0]]), 3), "sum to 1; independent yes-or-no labels"),
    (lambda: as_target(torch.tensor([[-0.5, 1.0, 0.5]]), 3), "non-negative"),
    (lambda: as_target(torch.tensor([[nan, 1.0, 0.0]]), 3), "non-negative and sum to 1"),
    (lambda: as_target(torch.tensor(1.0), 3), "should end in 3 classes"),
    (lambda: bin_of(randn(2), torch.tensor([0.0, 0.0, 1.0])), "increasing"),
    (lambda: bin_of(torch.tensor([nan]), torch.tensor([0.0, 1.0])), "lies in no bin"),
    (lambda: hl_gauss(torch.tensor([2.0]), torch.tensor([0.0, 1.0]), 0.1), "within 0 … 1: clip them"),
    (lambda: hl_gauss(torch.tensor([0.5]), torch.tensor([0.0, 1.0]), 0.0), "sigma must be positive, not 0"),
    (lambda: reliability(randn(3, 2), torch.zeros(2)), "should be"),
    (lambda: reliability(randn(0, 2), torch.zeros(0)), "at least 1"),
    (lambda: best_temperature(torch.tensor([[5.0, 0.0]]), torch.tensor([0])), "never err"),
])
def test_bad_input_is_told_what_was_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_what_broadcasting_would_have_computed():
    y = randn(64)
    with pytest.warns(UserWarning, match="different to the input size"):
        silent = F.mse_loss(y, y[:, None])
    assert silent == pytest.approx(float(2 * y.var(correction=0)))


EXPLORERS = {
    "fork": (figures.PLACES, figures.STEPS),
    "surfaces": (tuple(figures.POINTS), (figures.ALIKE, figures.OWN), figures.SURFACE_STEPS),
    "slopes": (figures.CLASSES, figures.MARGINS),
    "calibrated": (figures.TEMPERATURES, figures.TRAINED),
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_stop_has_a_picture_and_a_caption_of_its_own(name):
    draw, caption = getattr(figures, name), getattr(figures, f"{name}_caption")
    stops = list(itertools.product(*EXPLORERS[name]))
    pictures, words = {draw(*stop).as_str() for stop in stops}, {caption(*stop) for stop in stops}
    assert len(pictures) == len(words) == len(stops)
    assert all(line.endswith(".") and (line[0].isupper() or line[0].isdigit()) for line in words)
    assert sqrt(max(map(len, pictures))) < 250
