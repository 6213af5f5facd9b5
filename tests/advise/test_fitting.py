"""Fits to synthetic runs with known coefficients, and what they report."""

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from moefit.advise.fitting import FitSettings, _Data, fit_law, law_of
from moefit.advise.forms import CHINCHILLA, CLARK, FITTED_FORMS, FORMS, JOINT, YUN, Form, Points
from moefit.advise.laws import published_laws
from moefit.advise.runs import Run, Runs
from moefit.advise.shapes import Count, Shape
from moefit.errors import ConfigError, DataError

NO_BOOTSTRAP = FitSettings(bootstrap=0)
COEFFICIENTS: Mapping[str, Mapping[str, float]] = {
    "clark": published_laws()["clark-rlr"].coefficients,
    "joint": published_laws()["ludziejewski"].coefficients,
    "chinchilla": published_laws()["besiroglu"].coefficients,
    "yun": {
        "a": 60.0, "alpha": 0.25, "b": 0.4, "beta": 0.3, "c": 300.0, "gamma": 0.3, "f": 1.4,
        "d": -0.0005, "start": 2.0, "most": 250.0,
    },
}  # fmt: skip


def runs_of(form: Form, *, noise: float = 0.0) -> Runs:
    """Return runs of a law with its coefficients, and log-normal noise."""
    generator = np.random.default_rng(0)
    used = []
    experts = (1,) if form is CHINCHILLA else (1, 2, 4, 8, 16, 32, 128)
    tokens = (130e9,) if form is CLARK else (1e9, 4e9, 16e9, 64e9)
    for n in (3e7, 1e8, 3e8, 1e9, 3e9):
        for d in tokens:
            for e in experts:
                points = Points(parameters=n, tokens=d, experts=float(e))
                loss = float(form.loss(COEFFICIENTS[form.name], points))
                loss *= float(np.exp(noise * generator.normal()))
                name = f"{n:.0e}-{d:.0e}-{e}"
                used.append(Run(name=name, parameters=n, tokens=d, experts=e, loss=loss))
    return Runs(used=tuple(used), left_out={}, counts=Count.active)


def fitted(form: Form) -> np.ndarray:
    """Return the coefficients as they are fitted: positive ones as logarithms."""
    natural = COEFFICIENTS[form.name]
    return np.array(
        [np.log(natural[one]) if one in form.logged else natural[one] for one in form.coefficients]
    )


@pytest.mark.parametrize("form", [CLARK, CHINCHILLA])
def test_coefficients_are_recovered(form: Form) -> None:
    fit = fit_law(runs_of(form), form, NO_BOOTSTRAP)
    assert dict(fit.coefficients) == pytest.approx(dict(COEFFICIENTS[form.name]), rel=2e-3)
    assert fit.rms_log10 < 1e-5


@pytest.mark.parametrize("name", FITTED_FORMS)
def test_a_start_nearby_is_enough(name: str) -> None:
    form = FORMS[name]
    data = _Data.of(form, runs_of(form).used, 1e-3)
    theta_P, before = 1.02 * fitted(form), data.score(data.residual_R(1.02 * fitted(form)))
    found_P, after = data.minimise(theta_P, 300)
    assert after < 1e-2 * before
    assert found_P.shape == theta_P.shape


@pytest.mark.slow
@pytest.mark.parametrize("form", [JOINT, YUN])
def test_losses_of_large_forms_are_recovered(form: Form) -> None:
    """Their coefficients trade off, so that far away losses are compared, not coefficients."""
    fit = fit_law(runs_of(form), form, NO_BOOTSTRAP)
    assert fit.rms_log10 < 2e-4
    points = Points(parameters=6e9, tokens=128e9, experts=64.0)
    expected = form.loss(COEFFICIENTS[form.name], points)
    assert form.loss(fit.coefficients, points) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", FITTED_FORMS)
def test_gradients_are_those_of_differences(name: str) -> None:
    form = FORMS[name]
    data = _Data.of(form, runs_of(form, noise=0.01).used, 1e-3)
    theta_P = fitted(form)
    _, gradient_P = data.objective(theta_P)
    for index in range(len(theta_P)):
        step_P = np.zeros_like(theta_P)
        step_P[index] = 1e-7
        ends = data.objective(theta_P + step_P)[0], data.objective(theta_P - step_P)[0]
        slope = (ends[0] - ends[1]) / 2e-7
        assert gradient_P[index] == pytest.approx(slope, rel=2e-3, abs=1.0)


def test_too_few_runs_beside_those_held_out_are_named_at_once() -> None:
    runs = runs_of(CLARK)
    few = replace(runs, used=runs.used[: len(CLARK.coefficients) + 2])
    with pytest.raises(DataError, match=r"largest of .* held out: .* usable runs are too few"):
        fit_law(few, CLARK, FitSettings(bootstrap=10**9, hold_out_largest=True))


def test_intervals_and_held_out_errors_are_those_of_the_noise() -> None:
    noise = 0.004
    runs = runs_of(CLARK, noise=noise)
    fit = fit_law(runs, CLARK, FitSettings(bootstrap=30, hold_out_largest=True))
    for name, (low, high) in fit.intervals.items():
        assert low < high, name
    low, high = fit.intervals["a"]
    assert low < COEFFICIENTS["clark"]["a"] < high
    in_log10 = noise / np.log(10)
    assert fit.rms_log10 == pytest.approx(in_log10, rel=0.3)
    assert fit.left_out is not None
    assert set(fit.left_out.names) == {one.name for one in runs.used}
    assert fit.rms_log10 < fit.left_out.rms_log10 < 2 * in_log10
    assert fit.extrapolated is not None
    assert len(fit.extrapolated.names) == round(0.15 * len(runs.used))
    assert all(name.startswith("3e+09") for name in fit.extrapolated.names)
    assert fit.extrapolated.rms_log10 < 4 * in_log10
    again = fit_law(runs, CLARK, FitSettings(bootstrap=30, hold_out_largest=True))
    assert again.as_dict() == fit.as_dict()


def test_outliers_count_little_under_huber_and_much_under_squares() -> None:
    clean = runs_of(CHINCHILLA)
    spoiled = replace(
        clean, used=(replace(clean.used[0], loss=1.5 * clean.used[0].loss), *clean.used[1:])
    )
    expected = COEFFICIENTS["chinchilla"]["e"]
    robust = fit_law(spoiled, CHINCHILLA, NO_BOOTSTRAP).coefficients["e"]
    squares = fit_law(spoiled, CHINCHILLA, FitSettings(bootstrap=0, huber=1.0)).coefficients["e"]
    assert robust == pytest.approx(expected, rel=0.005)
    assert abs(squares - expected) > 5 * abs(robust - expected)


def test_a_fit_becomes_a_law_with_the_range_of_its_runs() -> None:
    fit = fit_law(runs_of(CLARK), CLARK, NO_BOOTSTRAP)
    law = law_of(fit, "mine", "synthetic")
    shape = Shape(width=1024, layers=16, experts=8)
    assert law.loss(shape, 1e9) == pytest.approx(published_laws()["clark-rlr"].loss(shape, 1e9))
    assert law.ranges["parameters"] == (3e7, 3e9)
    assert law.experts == (1, 2, 4, 8, 16, 32, 64, 128)
    assert law.fixed_tokens == 130e9
    assert law.counts is Count.active
    beyond = replace(fit, coefficients={**fit.coefficients, "start": 500.0})
    with pytest.raises(DataError, match=r"do not make a law.*0 < start < most"):
        law_of(beyond, "mine", "synthetic")


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"pip install 'moefit\[laws\]'"):
        fit_law(runs_of(CLARK), CLARK, NO_BOOTSTRAP)


def test_too_few_runs_say_how_many_are_needed() -> None:
    runs = runs_of(JOINT)
    few = replace(runs, used=runs.used[:9])
    with pytest.raises(DataError, match=r"9 usable runs are too few .* 11 coefficients.* 13"):
        fit_law(few, JOINT, NO_BOOTSTRAP)


def test_a_quantity_that_does_not_vary_is_refused() -> None:
    runs = runs_of(CLARK)
    dense = replace(runs, used=tuple(one for one in runs.used if one.experts < 4) * 2)
    with pytest.raises(DataError, match=r"only 2 different experts, .* at least 3"):
        fit_law(dense, CLARK, NO_BOOTSTRAP)
    with pytest.raises(DataError, match="only 1 different tokens"):
        fit_law(runs, CHINCHILLA, NO_BOOTSTRAP)
    every = runs_of(CHINCHILLA).used
    two = replace(runs, used=tuple(one for one in every if one.parameters < 2e8))
    with pytest.raises(DataError, match=r"only 2 different parameters, .* at least 3"):
        fit_law(two, CHINCHILLA, NO_BOOTSTRAP)


def test_a_quantity_without_a_term_must_not_vary() -> None:
    with pytest.raises(
        DataError, match=r"tokens from 1e\+09 to 6.4e\+10, and the form clark has no"
    ):
        fit_law(runs_of(JOINT), CLARK, NO_BOOTSTRAP)
    with pytest.raises(DataError, match="experts from 1 to 128, and the form chinchilla has no"):
        fit_law(runs_of(JOINT), CHINCHILLA, NO_BOOTSTRAP)
