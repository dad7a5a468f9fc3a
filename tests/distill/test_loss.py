"""The SPLAM loss against float64 transcriptions of the published algorithms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax import errors
from slam_jax.diffusion import parameterization, schedule, solver, subpath
from slam_jax.distill import gamma, loss

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LEVELS = schedule.from_config(CONFIG)
GRID = solver.start_grid(50, 1000)
HUBER_C = 0.01
METHOD = loss.Method(
    schedule=LEVELS,
    prediction=parameterization.EPSILON,
    times=GRID,
    length=20,
    stride=20,
    w=3.0,
    point=subpath.told_t(subpath.sigma_markov),
    distance=loss.pseudo_huber(HUBER_C),
    gamma_law=gamma.uniform,
)
# Inputs of every test, float64: both ends of the grid, and times that a 100-spaced grid lacks.
RANDOM = np.random.default_rng(0)
INDEX = np.array([0, 49, 12, 37, 3, 25])
X_0, NOISE = RANDOM.normal(size=(2, 6, 3, 2, 4))
TEXT, NULL_TEXT = RANDOM.normal(size=(2, 6, 5, 4))
GAMMA = np.array([0.3, 0.0, 1.0, 0.75, 0.5, 0.1])[:, None, None, None]
WEIGHT = {"student": 0.9, "target": 0.85, "teacher": 0.8}


def network(math, weight, x, t, text, position=1.0):
    """A made-up network for jnp and numpy alike; t and position are [B, 1, 1, 1] and real."""
    return math.tanh(weight * x + text.mean(1)[:, None, None, :] - 0.2 * position) + 4e-4 * t * x


def as_jax(weight, x, t, text, position=1.0):
    assert t.dtype == jnp.int32
    return network(jnp, weight, x, t.astype(jnp.float32)[:, None, None, None], text, position)


def nets(weights=WEIGHT):
    return tuple(
        functools.partial(as_jax, weights[name]) for name in ("student", "target", "teacher")
    )


def float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def draw(position=GAMMA, index=INDEX):
    return loss.Draw(jnp.asarray(index), *float32(NOISE, position))


def all_terms(student, target, teacher, method, x_0, text, null_text, drawn):
    ends = loss.pair(teacher, method, x_0, text, null_text, drawn)
    return loss.terms(student, target, method, ends, text, drawn.gamma)


def all_losses(student, target, teacher, method, x_0, text, null_text, drawn):
    ends = loss.pair(teacher, method, x_0, text, null_text, drawn)
    return loss.slam_loss(student, target, method, ends, text, drawn.gamma)


@functools.partial(jax.jit, static_argnums=0)
def compiled(function, *arrays):
    return function(*arrays)


def our_loss(method, weights=WEIGHT, position=GAMMA, index=INDEX):
    """slam_loss at the inputs above."""

    @jax.jit
    def run(x_0, text, null_text, draw):
        return all_losses(*nets(weights), method, x_0, text, null_text, draw)

    return run(*float32(X_0, TEXT, NULL_TEXT), draw(position, index))


# --- METHOD.md §1.11 in float64, looped over the examples -----------------------------------


def transcribed_splam(length, stride, w, v_prediction=False, weights=WEIGHT, index=INDEX):
    """Loss of each example by the published algorithm."""
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    def c_skip(t):
        return 0.25 / ((10 * t) ** 2 + 0.25)

    def c_out(t):
        return 10 * t / np.sqrt((10 * t) ** 2 + 0.25)

    def origin(x, output, alpha, sigma):
        if not v_prediction:
            return (x - sigma * output) / alpha
        norm = np.sqrt(alpha**2 + sigma**2)
        return alpha * x / norm**2 - sigma / norm * output

    losses = []
    for b in range(len(index)):

        def net(name, x, t, text, position=1.0, b=b):
            return network(np, weights[name], x[None], t, text[b : b + 1], position)[0]

        t = 20 * (index[b] + 1) - 1
        z_t = a[t] * X_0[b] + s[t] * NOISE[b]
        y, q = z_t, t
        for _ in range(length // stride):
            if q == 0:
                break
            cond, uncond = net("teacher", y, q, TEXT), net("teacher", y, q, NULL_TEXT)
            output = cond + w * (cond - uncond)
            x0 = origin(y, output, a[q], s[q])
            eps = a[q] * output + s[q] * y if v_prediction else output
            q = max(q - stride, 0)
            y = a[q] * x0 + s[q] * eps
        z_u, u = y, q
        output = net("target", z_u, u, TEXT)
        target = c_skip(u) * z_u + c_out(u) * origin(z_u, output, a[u], s[u])
        g = GAMMA[b, 0, 0, 0]
        ratio = a[t] / a[u]
        z_g = (1 - g) * ratio * z_u + g * z_t
        sigma_g = np.sqrt((ratio * s[u]) ** 2 + g**2 * (1 - ratio**2))
        output = net("student", z_g, t, TEXT, g)
        prediction = c_skip(t) * z_g + c_out(t) * origin(z_g, output, a[t], sigma_g)
        losses.append(np.mean(np.sqrt((prediction - target) ** 2 + HUBER_C**2) - HUBER_C))
    return np.array(losses)


def transcribed_lcm(w, squared):
    """Latent consistency distillation (Luo et al. 2023, Algorithm 1) in its own terms, k = 20."""
    betas = np.linspace(np.sqrt(0.00085), np.sqrt(0.012), 1000) ** 2
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    t_n1 = 20 * INDEX + 19
    t_n = np.where(INDEX == 0, 0, t_n1 - 20)

    def levels(t):
        alpha = np.exp(0.5 * log_alpha_bar[t])[:, None, None, None]
        return alpha, np.sqrt(-np.expm1(log_alpha_bar[t]))[:, None, None, None]

    def consistency(weight, z, t):
        time = t[:, None, None, None]
        alpha, sigma = levels(t)
        denoised = (z - sigma * network(np, weight, z, time, TEXT)) / alpha
        scale = 1 / (1 + (20 * time) ** 2)
        return scale * z + np.sqrt(1 - scale) * denoised

    z = levels(t_n1)[0] * X_0 + levels(t_n1)[1] * NOISE
    (alpha, sigma), (alpha_n, sigma_n) = levels(t_n1), levels(t_n)
    # The PF-ODE solver's increment, guided: (1 + w) Psi(c) - w Psi(null).
    increments = []
    for text in (TEXT, NULL_TEXT):
        eps = network(np, WEIGHT["teacher"], z, t_n1[:, None, None, None], text)
        increments.append(alpha_n / alpha * (z - sigma * eps) + sigma_n * eps - z)
    z_hat = z + (1 + w) * increments[0] - w * increments[1]
    difference = consistency(WEIGHT["student"], z, t_n1) - consistency(WEIGHT["target"], z_hat, t_n)
    if squared:
        return np.mean(difference**2, axis=(1, 2, 3))
    return np.mean(np.hypot(difference, HUBER_C) - HUBER_C, axis=(1, 2, 3))


# --- The loss is the published one ------------------------------------------------------------


@pytest.mark.parametrize("v_prediction", [False, True], ids=["epsilon", "v"])
@pytest.mark.parametrize("length, stride", [(20, 20), (100, 20), (100, 100)])
def test_loss_is_the_published_algorithm(length, stride, v_prediction):
    prediction = [parameterization.EPSILON, parameterization.V_PREDICTION][v_prediction]
    method = loss.checked(METHOD._replace(length=length, stride=stride, prediction=prediction))
    expected = transcribed_splam(length, stride, METHOD.w, v_prediction)
    np.testing.assert_allclose(our_loss(method), expected, rtol=2e-5)


@pytest.mark.parametrize("squared", [False, True], ids=["huber", "l2"])
@pytest.mark.parametrize("w", [0.0, 8.0])
def test_gamma_one_makes_it_the_lcm_loss(w, squared):
    distance = loss.squared if squared else loss.pseudo_huber(HUBER_C)
    method = METHOD._replace(w=w, distance=distance)
    ones = gamma.ones(jax.random.key(0), len(INDEX), 0.0)
    np.testing.assert_allclose(
        our_loss(method, position=ones), transcribed_lcm(w, squared), rtol=2e-5
    )


@pytest.mark.parametrize("sigma", [subpath.sigma_ddim, subpath.sigma_fixed])
def test_noise_level_is_the_function_that_the_method_names(sigma):
    ours, published = our_loss(METHOD._replace(point=subpath.told_t(sigma))), our_loss(METHOD)
    at_one = GAMMA.ravel() == 1.0
    np.testing.assert_allclose(ours[at_one], published[at_one], rtol=1e-6)
    assert (np.abs(ours - published)[~at_one] > 1e-5).any()


def test_matched_points_are_those_of_lcm_at_their_own_times():
    """Told the time of the point, the student is asked what LCM asks it there."""
    at_one = METHOD._replace(point=subpath.matched)
    ones = gamma.ones(jax.random.key(0), len(INDEX), 0.0)
    lcm = our_loss(METHOD, position=ones)
    np.testing.assert_allclose(our_loss(at_one, position=ones), lcm, rtol=1e-6)
    told = []

    def student(x, t, text, position):
        told.append((t, position))
        return x

    all_terms(
        student, *nets(WEIGHT)[1:], at_one, *float32(X_0, TEXT, NULL_TEXT), draw(GAMMA, INDEX)
    )
    ((t, position),) = told
    ends = np.asarray(GRID)[INDEX]
    assert (t <= ends).all() and (t >= ends - 20).all() and (position == 1).all()


def test_matched_points_need_signal_at_every_time():
    lost = METHOD.schedule._replace(alpha=METHOD.schedule.alpha.at[-1].set(0.0))
    with pytest.raises(errors.UserError, match="infinite.*choose markov"):
        loss.checked(METHOD._replace(point=subpath.matched, schedule=lost))


# --- What is trained, and what is not ----------------------------------------------------------


def test_gradient_reaches_the_student_alone():
    def total(weights):
        return our_loss(METHOD._replace(length=100), weights).sum()

    gradient = jax.grad(total)({name: jnp.float32(value) for name, value in WEIGHT.items()})
    assert gradient["target"] == gradient["teacher"] == 0.0

    def transcribed(step):
        moved = {**WEIGHT, "student": WEIGHT["student"] + step}
        return transcribed_splam(100, 20, METHOD.w, weights=moved).sum()

    slope = (transcribed(1e-5) - transcribed(-1e-5)) / 2e-5
    np.testing.assert_allclose(gradient["student"], slope, rtol=1e-3)


def test_loss_is_zero_where_student_is_target_and_the_ends_coincide():
    # Time 0 is on the grid of all times: there t = s, and f is the identity.
    method = loss.checked(METHOD._replace(times=solver.all_times(1000)))
    weights = {**WEIGHT, "target": WEIGHT["student"]}
    values = our_loss(method, weights, index=np.array([0, 0, 0, 0, 0, 500]))
    assert (values[:5] == 0.0).all()
    assert values[5] > 0.0


def test_each_example_stands_alone():
    order = np.array([3, 0, 5, 1, 4, 2])

    @jax.jit
    def run(x_0, text, null_text, draw):
        return all_losses(*nets(), METHOD, x_0, text, null_text, draw)

    shuffled = run(
        *float32(X_0[order], TEXT[order], NULL_TEXT[order]),
        loss.Draw(jnp.asarray(INDEX[order]), *float32(NOISE[order], GAMMA[order])),
    )
    assert shuffled.shape == (6,)
    np.testing.assert_allclose(shuffled, our_loss(METHOD)[order], rtol=1e-5)


# --- Times -------------------------------------------------------------------------------------


def test_fine_grid_serves_long_subpaths_too():
    method = loss.checked(METHOD._replace(length=100, stride=20))
    values = compiled(
        lambda *arrays: all_terms(*nets(), method, *arrays, draw()),
        *float32(X_0, TEXT, NULL_TEXT),
    )
    # 259 and 759 are visited by four-step sampling; a 100-spaced grid would lack them.
    np.testing.assert_array_equal(values.t, [19, 999, 259, 759, 79, 519])
    np.testing.assert_array_equal(values.s, [0, 899, 159, 659, 0, 419])


@pytest.mark.parametrize("length, stride, spacing", [(50, 50, 20), (30, 10, 20), (5, 5, 20)])
def test_targets_at_times_never_trained_are_refused(length, stride, spacing):
    method = METHOD._replace(length=length, stride=stride)
    with pytest.raises(errors.UserError, match=rf"length {length} .*spacing {spacing}\b"):
        loss.checked(method)
    every = method._replace(times=solver.all_times(1000))
    assert loss.checked(every) is every


def test_grids_that_do_not_divide_a_thousand_are_sound():
    loss.checked(METHOD._replace(times=solver.start_grid(30, 1000), length=66, stride=33))
    loss.checked(METHOD._replace(times=solver.start_grid(1, 1000), length=1000, stride=200))


@pytest.mark.parametrize("length, stride", [(100, 30), (20, 40), (0, 20), (20, 0), (-20, 20)])
def test_stride_must_divide_length(length, stride):
    with pytest.raises(errors.UserError, match=f"length {length} .* stride {stride}"):
        loss.checked(METHOD._replace(length=length, stride=stride))


def test_low_precision_never_touches_times():
    seen = []

    def watched(x, t, text, position=None):
        seen.append((t, position))
        assert x.dtype == jnp.float32
        return (x.astype(jnp.bfloat16) * text.mean()).astype(jnp.bfloat16)

    low = (jnp.asarray(array, jnp.bfloat16) for array in (X_0, TEXT, NULL_TEXT))
    values = all_terms(watched, watched, watched, METHOD, *low, draw())
    floats = (value for value in values if jnp.issubdtype(value.dtype, jnp.floating))
    assert sum(value.dtype != jnp.float32 for value in floats) == 2  # the two raw outputs
    (t, position), (s, one) = seen[-2:]
    # 999 and 759 are 1000 and 760 in bfloat16.
    np.testing.assert_array_equal(t, [19, 999, 259, 759, 79, 519])
    np.testing.assert_array_equal(s, [0, 979, 239, 739, 59, 499])
    assert all(t.dtype == jnp.int32 for t, _ in seen)
    assert position.dtype == one.dtype == jnp.float32


def test_zero_terminal_snr_is_finite_with_v():
    levels = schedule.from_config(
        {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    )
    method = METHOD._replace(schedule=levels, prediction=parameterization.V_PREDICTION)
    smallest = np.full_like(GAMMA, 2.0**-24)
    assert np.isfinite(our_loss(method, position=smallest)).all()


# --- Draws and distances -------------------------------------------------------------------------


def test_draws_cover_the_grid_and_are_independent():
    batch = 5000
    x_0 = jnp.zeros((batch, 2, 1, 1))
    ours = jax.jit(lambda key: loss.draw_subpath(key, x_0, METHOD, 0.0))(jax.random.key(0))
    counts = np.bincount(ours.index, minlength=50)
    assert counts.size == 50
    assert (np.abs(counts - batch / 50) < 5 * np.sqrt(batch / 50)).all()
    assert abs(np.mean(ours.noise)) < 5 / np.sqrt(2 * batch)
    assert abs(np.std(ours.noise) - 1) < 5 / np.sqrt(4 * batch)
    assert ours.noise.dtype == jnp.float32
    rows = np.stack([ours.index, np.ravel(ours.gamma), *np.asarray(ours.noise).reshape(batch, 2).T])
    off_diagonal = np.corrcoef(rows) - np.eye(4)
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(batch)


def test_draws_follow_the_key_and_the_law():
    x_0 = jnp.zeros((4, 3, 2, 4), jnp.bfloat16)
    method = METHOD._replace(gamma_law=gamma.annealed(0.0, 1.0, 1.0))
    one, same, other = (
        loss.draw_subpath(jax.random.key(seed), x_0, method, 1.0) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.noise != other.noise).any()
    assert (one.gamma == 1.0).all()
    assert one.noise.dtype == jnp.float32


def test_distances_per_example():
    a, b = float32(X_0, X_0 + NOISE)
    np.testing.assert_allclose(loss.squared(a, b), np.mean(NOISE**2, axis=(1, 2, 3)), rtol=1e-5)
    huber = np.mean(np.sqrt(NOISE**2 + 0.3**2) - 0.3, axis=(1, 2, 3))
    np.testing.assert_allclose(loss.pseudo_huber(0.3)(a, b), huber, rtol=1e-5)


def test_huber_is_exact_near_zero():
    distance = loss.pseudo_huber(1e-3)
    a = jnp.asarray(X_0, jnp.float32)
    assert (distance(a, a) == 0.0).all()
    near = jnp.full((1, 2, 2, 1), 1e-6)
    np.testing.assert_allclose(distance(near, jnp.zeros_like(near)), 0.5e-9, rtol=1e-5)
    gradient = jax.grad(lambda a: distance(a, jnp.zeros_like(a)).sum())(jnp.zeros((1, 2, 2, 1)))
    assert (gradient == 0.0).all()
    with pytest.raises(errors.UserError, match="huber_c 0.0 must be positive"):
        loss.pseudo_huber(0.0)
