"""The shallow network's figures against the book's numbers, closed forms and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.studies.lecture import bagging, dropout, early_stopping, noise, shallow, smoothing

BOOK = shallow.book_data(np.random.RandomState(1))


def test_the_data_are_the_books():
    assert BOOK.x[[0, 1, -1]] == pytest.approx([0.027801, 0.114688, 0.935159], abs=1e-6)
    assert BOOK.y[[0, 1, -1]] == pytest.approx([0.93182, 2.46617, 0.417498], abs=1e-6)


def test_the_fit_is_the_books():
    parameters = shallow.fit(BOOK)
    assert shallow.test_error(shallow.predict(parameters)) == pytest.approx(0.1954, abs=5e-5)
    assert shallow.training_error(parameters, BOOK) == pytest.approx(0.0034, abs=5e-5)


def test_there_are_14_pieces_with_knots_at_fourteenths():
    parameters = np.random.default_rng(0).standard_normal(15)
    slopes = np.diff(shallow.predict(parameters, np.linspace(0, 1, 14 * 10 + 1))).reshape(14, 10)
    assert np.ptp(slopes, axis=1) == pytest.approx(0, abs=1e-12)
    assert (np.abs(np.diff(slopes[:, 0])) > 1e-6).all()


@pytest.mark.parametrize("penalty", [1e-5, 1e-2, 1.0])
def test_a_fit_is_least_squares_with_the_penalty_as_rows(penalty: float):
    rows = np.sqrt(penalty) * np.eye(15)[1:]
    inputs = np.concatenate([shallow.features(BOOK.x), rows])
    expected = np.linalg.lstsq(inputs, np.concatenate([BOOK.y, np.zeros(14)]), rcond=None)[0]
    np.testing.assert_allclose(shallow.fit(BOOK, penalty), expected, rtol=1e-6)


def test_many_fits_are_each_ones():
    many = shallow.many_data(0, 3)
    together = shallow.fit(many, 0.01)
    for number in range(3):
        alone = shallow.Data(many.x[number], many.y[number])
        np.testing.assert_allclose(shallow.fit(alone, 0.01), together[number])
        assert shallow.training_error(together, many)[number] == pytest.approx(
            float(shallow.training_error(together[number], alone))
        )


def test_rising_l2_smooths_at_the_price_of_the_training_error():
    strengths = np.array([1e-5, 1e-3, 0.1, 10])
    training, test = smoothing.errors(shallow.many_data(0, 300), strengths)
    assert (np.diff(training, axis=0) > 0).all()  # of each single data set
    assert test.mean(1).argmin() == 1
    sizes = [np.square(shallow.fit(BOOK, strength)[1:]).sum() for strength in strengths]
    assert (np.diff(sizes) < 0).all()


def test_the_books_ensemble():
    data, members = bagging.book_example()
    errors = bagging.evaluate(data, members)
    np.testing.assert_array_equal(data.x, BOOK.x)
    assert errors.single == pytest.approx(0.1954, abs=5e-5)
    assert errors.members == pytest.approx([0.222279, 0.09787, 0.120199, 0.047949], abs=1e-6)
    assert errors.median == pytest.approx(0.0198, abs=5e-5)
    assert errors.mean == pytest.approx(0.0182, abs=5e-5)


def test_to_beat_every_member_is_luck():
    """Reference values of an independent implementation with 2000 bootstraps of its own."""
    errors = bagging.repeat(2000, new_data=False)
    best = errors.members.min(1)
    assert bagging.share(errors.mean, best) == pytest.approx(0.338, abs=0.035)
    assert bagging.share(errors.median, best) == pytest.approx(0.374, abs=0.035)
    assert bagging.share(errors.mean, errors.single) == pytest.approx(0.777, abs=0.03)
    assert bagging.share(errors.median, errors.single) == pytest.approx(0.777, abs=0.03)
    medians = [np.median(values) for values in (errors.members, best, errors.median, errors.mean)]
    assert medians == pytest.approx([0.212, 0.088, 0.110, 0.117], rel=0.08)


def test_the_mean_beats_the_members_mean_always():
    """By convexity, for any data."""
    for new_data in (False, True):
        errors = bagging.repeat(200, new_data=new_data)
        assert bagging.share(errors.mean, errors.members.mean(1)) == 1


def test_a_bootstrap_is_a_fit_to_the_chosen_points():
    chosen = np.array([[[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]])
    many = shallow.many_data(3, 1)
    alone = shallow.fit(shallow.Data(many.x[0, chosen[0, 0]], many.y[0, chosen[0, 0]]))
    np.testing.assert_allclose(bagging.resample(many, chosen)[0, 0], alone)


def test_noise_on_the_inputs_fits_the_expectation():
    """The expected products of ReLUs under Gaussian noise by brute force give the same fit."""
    deviation = 0.1
    draws = BOOK.x + deviation * np.random.default_rng(0).standard_normal((40_000, 15))
    inputs = shallow.features(draws)
    second = np.einsum("dni,dnj->ij", inputs, inputs) / len(draws)
    first = np.einsum("dni,n->i", inputs, BOOK.y) / len(draws)
    expected = np.linalg.solve(second + 1e-5 * np.diag([0.0, *[1.0] * 14]), first)
    outputs = shallow.predict(noise.fit(BOOK, deviation))
    np.testing.assert_allclose(outputs, shallow.predict(expected), atol=0.02)


def test_noise_on_the_inputs_of_a_line_is_l2():
    """Far from every knot but the first the network is a line, and noise of variance s² adds n s² slope²."""
    data = shallow.Data(np.array([0.02, 0.03, 0.04, 0.05]), np.array([1.0, 1.3, 1.2, 1.7]))
    deviation = 0.004
    slope = float(noise.fit(data, deviation)[1])
    centred, targets = data.x - data.x.mean(), data.y - data.y.mean()
    ridge = (centred @ targets) / (centred @ centred + len(data.x) * deviation**2 + shallow.TINY)
    assert slope == pytest.approx(ridge, rel=5e-3)
    assert abs(slope - (centred @ targets) / (centred @ centred)) > 0.05 * ridge


def test_no_noise_is_the_plain_fit():
    outputs = shallow.predict(noise.fit(BOOK, 0.0))
    np.testing.assert_allclose(outputs, shallow.predict(shallow.fit(BOOK)), atol=1e-5)


def test_a_little_noise_helps_and_much_does_not():
    many = shallow.many_data(0, 50)
    none, some, much = (shallow.test_error(shallow.predict(noise.fit(many, s))).mean() for s in (0.0, 0.05, 0.3))
    assert some < 0.5 * none < 0.5 * much < much


def test_stopping_early_is_sgd_and_its_best_moment():
    data, held_out = shallow.many_data(0, 3), shallow.many_data(1, 3)
    history = early_stopping.train(data, held_out, 50)
    # The same steps by torch, on the second data set.
    random = np.random.default_rng(0)
    start = random.standard_normal((3, 15))
    phi = torch.nn.Parameter(torch.tensor(start[1]))
    optimizer = torch.optim.SGD([phi], lr=0.05)
    inputs, targets = torch.tensor(shallow.features(data.x[1])), torch.tensor(data.y[1])
    orders = np.concatenate([random.permutation(15) for _ in range(17)]).reshape(-1, 5)[:50]
    for chosen in orders:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(inputs[chosen] @ phi, targets[chosen]).backward()
        optimizer.step()
    assert history.steps[0] == 0
    assert history.steps[-1] == 50
    np.testing.assert_allclose(history.parameters[-1, 1], phi.detach(), rtol=1e-9)
    best = history.validation[history.stop, range(3)]
    assert (best <= history.validation).all()


def test_training_on_overfits():
    data = shallow.many_data(0, 50)
    history = early_stopping.train(data, shallow.many_data(1, 50), 60_000)
    training, test = history.training.mean(1), history.test.mean(1)
    assert training[-1] < training[:-1].min()
    assert 5_000 < history.steps[test.argmin()] < 60_000
    assert test.min() < 0.97 * test[-1]
    assert test[-1] < 0.5 * shallow.test_error(shallow.predict(shallow.fit(data))).mean()


def test_gradient_descent_cannot_see_the_kink_and_dropout_removes_it():
    data = dropout.gapped_data()
    beginning = dropout.start(data)
    flat = beginning - dropout.HEIGHT * dropout.TENT
    assert shallow.training_error(flat, data) == pytest.approx(float(shallow.training_error(beginning, data)))
    middle = np.array([8 / 14])
    assert shallow.predict(beginning, middle) - shallow.predict(flat, middle) == pytest.approx(dropout.HEIGHT / 14)
    plain = dropout.train(data, None)
    assert dropout.kink(plain) == pytest.approx(dropout.HEIGHT, abs=1e-9)
    chosen = np.random.default_rng(5).integers(3, size=(dropout.STEPS, 20))
    last = dropout.train(data, chosen)[-1]
    assert np.abs(dropout.kink(last)).max() < 0.1
    assert shallow.training_error(last, data).max() < 1.3 * shallow.training_error(plain[-1], data)
    assert shallow.test_error(shallow.predict(last)).max() < shallow.test_error(shallow.predict(plain[-1]))


def test_dropout_goes_in_the_mean_where_the_expected_loss_leads():
    """The masks of the steps are independent, so that the mean of the paths follows the mean of the gradients."""
    data, steps = dropout.gapped_data(), 30
    inputs = shallow.features(data.x)
    expected = torch.tensor(dropout.start(data))
    masks = torch.ones(3, 15, dtype=torch.float64)
    masks[range(3), [8, 9, 10]] = 0
    for _ in range(steps):
        expected.requires_grad_()
        outputs = torch.tensor(inputs) @ (expected * masks).T
        loss = (outputs - torch.tensor(data.y)[:, None]).square().mean()
        expected = (expected - dropout.RATE * torch.autograd.grad(loss, expected)[0]).detach()
    chosen = np.random.default_rng(0).integers(3, size=(steps, 4000))
    last = dropout.train(data, chosen, steps)[-1]
    error = last.std(0) / np.sqrt(len(last))
    assert (np.abs(last.mean(0) - expected.numpy()) < 4.5 * error + 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-4, 1.0))
def test_no_data_within_the_gap_notice_the_tent(seed: int, height: float):
    x = np.random.default_rng(seed).random(30)
    outside = x[(x <= 7 / 14) | (x >= 9 / 14)]
    assert shallow.predict(height * dropout.TENT, outside) == pytest.approx(0, abs=1e-12)
