"""The train step with networks of five lines: what moves, what stays, and on how many devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slam_jax.diffusion import parameterization, schedule, solver, subpath
from slam_jax.distill import gamma, loss, optimizer, state, step
from slam_jax.nets import lora
from slam_jax.runtime import apart, mesh

SCHEDULE = schedule.from_config(
    dict(
        num_train_timesteps=1000, beta_start=8.5e-4, beta_end=1.2e-2, beta_schedule="scaled_linear"
    )
)


def _gamma_law(key, batch, progress):
    return progress * gamma.uniform(key, batch, progress)


METHOD = loss.Method(
    SCHEDULE, parameterization.EPSILON, solver.start_grid(50, 1000), 20, 20, 2.0,
    subpath.told_t(subpath.sigma_markov), loss.pseudo_huber(1e-3), _gamma_law,
)  # fmt: skip
ADAMW = optimizer.adamw(1e-2, 0, 1.0, 0.0, 0.9, 0.999, 1e-8)
ACCUMULATE = 2
MAX_GRAD_NORM = 100.0


def _net(params, x, t, text, *gamma):
    time = jnp.sin(t.astype(jnp.float32))[:, None, None, None] * params["time"]
    words = jnp.mean(text, axis=(1, 2))[:, None, None, None] * params["text"]
    return x @ params["proj"]["kernel"] + time + words + sum(gamma) * params["gamma"]


NETS = step.Nets(
    student=_net,
    student_params=step.all_trained,
    teacher=_net,
    encode_image=lambda params, batch, key: (
        batch["image"][:, ::2, ::2] * params
        + 0.1 * jax.random.normal(key, batch["image"][:, ::2, ::2].shape)
    ),
    encode_text=lambda params, batch: params[batch["input_ids"]],
)


# Trained are additions of rank 2 to the teacher's kernel, and a gamma layer of its own.
LORA_NETS = NETS._replace(student_params=partial(lora.merge, scale=0.5))


def _params(seed):
    kernel_key, bias_key = jax.random.split(jax.random.key(seed))
    biases = jax.random.normal(bias_key, (3,))
    return {
        "proj": {"kernel": jax.random.normal(kernel_key, (3, 3))},
        "time": biases[0], "text": biases[1], "gamma": biases[2],
    }  # fmt: skip


def _inputs():
    rng = np.random.default_rng(0)
    frozen = state.Frozen(
        teacher=_params(1), vae=jnp.float32(0.5), null_text=jnp.zeros((1, 5, 2)),
        text_encoder=jnp.asarray(rng.normal(size=(11, 2)), jnp.float32),
    )  # fmt: skip
    batch = {
        "image": rng.uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32),
        "input_ids": rng.integers(0, 11, (8, 5)).astype(np.int32),
    }
    start = state.init(_params(1), ADAMW).replace(step=jnp.int32(3), target=_params(2))
    return start, frozen, batch, jax.random.key(7)


def _lora_start():
    down_key, up_key = jax.random.split(jax.random.key(5))
    trained = {
        "proj": {
            "lora_down": {"kernel": jax.random.normal(down_key, (3, 2))},
            "lora_up": {"kernel": 0.1 * jax.random.normal(up_key, (2, 3))},
        },
        "gamma": jnp.float32(0.3),
    }
    target = jax.tree.map(lambda x: 0.5 * x, trained)
    return state.init(trained, ADAMW).replace(step=jnp.int32(3), target=target)


def _step(num_devices, nets=NETS, over_devices=None):
    """The step as the driver compiles it: (state, frozen, host batch, key) -> (state, metrics)."""
    devices = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    everywhere = mesh.replicated(devices)
    run = jax.jit(
        partial(
            step.train_step,
            nets=nets,
            method=METHOD,
            optimizer=ADAMW,
            ema_rate=0.9,
            num_steps=10,
            max_grad_norm=MAX_GRAD_NORM,
            over_devices=over_devices and over_devices(devices),
        ),
        out_shardings=everywhere,
    )

    def call(start, frozen, batch, key):
        start, frozen, key = jax.device_put((start, frozen, key), everywhere)
        return run(start, frozen, mesh.put_batch(batch, ACCUMULATE, devices), key)

    return call


def _assert_close(ours, theirs, atol):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), ours, theirs)


@pytest.fixture(scope="module")
def one_device():
    return _step(1)


def test_student_moves_and_target_follows_by_its_rate(one_device):
    start, frozen, batch, key = _inputs()
    after, metrics = one_device(start, frozen, batch, key)
    assert after.step == 4
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), after.student, start.student)
    assert all(distance > 0 for distance in jax.tree.leaves(moved)), moved
    expected = jax.tree.map(
        lambda old, new: 0.9 * np.asarray(old) + 0.1 * np.asarray(new), start.target, after.student
    )
    _assert_close(after.target, expected, 3e-7)
    assert {name: value.shape for name, value in metrics.items()} == {
        "loss": (), "grad_norm": (), "update_norm": (), "skipped": (),
    }  # fmt: skip


def _merged_by_hand(teacher, trained):
    halves = trained["proj"]
    added = 0.5 * halves["lora_down"]["kernel"] @ halves["lora_up"]["kernel"]
    kernel = teacher["proj"]["kernel"] + added
    return {**teacher, "proj": {"kernel": kernel}, "gamma": trained["gamma"]}


@pytest.mark.parametrize("with_lora", [False, True])
def test_update_is_that_of_the_mean_gradient(with_lora, one_device, one_lora_device):
    """Against the plain mean over microbatches, each with its own key; 3 of 10 steps are done.

    The teacher stays the base alone: elsewhere the adapters were left on (diffusers #6351).
    """
    start, frozen, batch, key = _inputs()
    run, whole = one_device, step.all_trained
    if with_lora:
        start, run, whole = _lora_start(), one_lora_device, _merged_by_hand
    _, metrics = run(start, frozen, batch, key)

    def mean_loss(trained):
        student, target = (whole(frozen.teacher, each) for each in (trained, start.target))
        total = 0.0
        for number in range(ACCUMULATE):
            part = {name: x[number::ACCUMULATE] for name, x in batch.items()}
            part_key = jax.random.fold_in(jax.random.fold_in(key, 3), number)
            posterior_key, draw_key = jax.random.split(part_key)
            x_0 = NETS.encode_image(frozen.vae, part, posterior_key)
            text = NETS.encode_text(frozen.text_encoder, part)
            draw = loss.draw_subpath(draw_key, x_0, METHOD, 0.3)
            teacher = partial(_net, frozen.teacher)
            ends = loss.pair(teacher, METHOD, x_0, text, frozen.null_text, draw)
            nets = partial(_net, student), partial(_net, target)
            total += loss.slam_loss(*nets, METHOD, ends, text, draw.gamma).mean()
        return total / ACCUMULATE

    expected, gradient = jax.jit(jax.value_and_grad(mean_loss))(start.student)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)


@pytest.mark.parametrize("over_devices", [None, apart.mean_over_devices])
def test_one_device_equals_four(over_devices, one_device):
    start, frozen, batch, key = _inputs()
    ours, our_metrics = one_device(start, frozen, batch, key)
    four, four_metrics = _step(4, over_devices=over_devices)(start, frozen, batch, key)
    _assert_close(four_metrics, our_metrics, 1e-4)
    _assert_close(four.target, ours.target, 1e-5)


@pytest.fixture(scope="module")
def one_lora_device():
    return _step(1, LORA_NETS)


def test_lora_steps_move_the_additions_and_keep_the_teacher(one_lora_device):
    """The same on 4 devices; the state holds nothing of the base."""
    _, frozen, batch, key = _inputs()
    teacher = jax.device_get(frozen.teacher)
    start = _lora_start()
    one, four, on_four = start, start, _step(4, LORA_NETS)
    for _ in range(3):
        one, _ = one_lora_device(one, frozen, batch, key)
        four, _ = on_four(four, frozen, batch, key)
    jax.tree.map(np.testing.assert_array_equal, frozen.teacher, teacher)
    for moved, before in ((one.student, start.student), (one.target, start.target)):
        distances = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), moved, before)
        assert all(distance > 0 for distance in jax.tree.leaves(distances)), distances
    _assert_close(four.target, one.target, 1e-5)
    # Student, target and both moments; the step and the optimizer's two counters.
    assert sum(leaf.size for leaf in jax.tree.leaves(one)) == 4 * (3 * 2 + 2 * 3 + 1) + 3


def test_randomness_depends_on_the_step_alone(one_device):
    start, frozen, batch, key = _inputs()
    _, first = one_device(start, frozen, batch, key)
    _, again = one_device(start, frozen, batch, key)
    _, later = one_device(start.replace(step=start.step + 1), frozen, batch, key)
    assert first["loss"] == again["loss"] != later["loss"]


@pytest.mark.parametrize("poison", [np.inf, np.nan, 1e9])
def test_an_update_that_would_spoil_everything_is_dropped(one_device, poison):
    """Too large a gradient as well as none at all; and what follows is as if it had not been."""
    start, frozen, batch, key = _inputs()
    start = jax.device_get(start)
    batch["image"][3] = poison
    after, metrics = one_device(start, frozen, batch, key)
    assert metrics["skipped"] == 1 and not metrics["grad_norm"] <= MAX_GRAD_NORM
    assert np.isfinite(metrics["loss"]) == (poison == 1e9)
    assert after.step == start.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=start.step), start)


@pytest.fixture(scope="module")
def compiled_update():
    """Of ADAMW, its state given away; (state, loss, gradient) -> (state, metrics)."""
    start = state.init({"kernel": jnp.ones((64, 64))}, ADAMW)
    update = partial(step.update, optimizer=ADAMW, ema_rate=0.9, max_grad_norm=MAX_GRAD_NORM)
    gradient = {"kernel": jnp.full((64, 64), 1e-3)}
    lowered = jax.jit(update, donate_argnums=0).lower(start, jnp.float32(1.0), gradient)
    return lowered.compile(), start, gradient


def test_an_infinite_update_is_dropped_though_its_gradient_is_finite(compiled_update):
    update, start, gradient = compiled_update
    infinite = {"kernel": jnp.full((64, 64), jnp.inf)}
    before = start.replace(opt_state=optax.tree.set(start.opt_state, mu=infinite))
    before = jax.tree.map(jnp.copy, before)
    expected = jax.device_get(before)
    after, metrics = update(before, jnp.float32(1.0), gradient)
    assert metrics["skipped"] == 1 and after.step == expected.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=expected.step), expected)


def test_on_accelerators_numbers_of_an_update_that_are_not_finite_are_left_out(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
    params = {"kernel": jnp.ones((2, 2))}
    start = state.init(params, ADAMW)
    spoilt = {"kernel": jnp.array([[jnp.inf, 0.0], [jnp.nan, 0.0]])}
    start = start.replace(opt_state=optax.tree.set(start.opt_state, mu=spoilt))
    update = partial(step.update, optimizer=ADAMW, ema_rate=0.9, max_grad_norm=MAX_GRAD_NORM)
    after, metrics = update(start, jnp.float32(1.0), {"kernel": jnp.full((2, 2), 1e-3)})
    assert metrics["skipped"] == 1
    for trained in (after.student["kernel"], after.target["kernel"]):
        assert (trained[:, 0] == 1).all() and (trained[:, 1] < 1).all()


def test_no_array_of_the_state_is_copied_to_be_replaced(compiled_update):
    update, *_ = compiled_update
    assert "conditional(" not in update.as_text()
    copied = re.findall(r"= f32\[64,64\]\S* copy\(", update.as_text())
    assert not copied


def test_other_updates_are_not_dropped(one_device):
    start, frozen, batch, key = _inputs()
    _, metrics = one_device(start, frozen, batch, key)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] < MAX_GRAD_NORM


def test_state_is_float32_and_shares_no_memory():
    params = _params(1)
    start = state.init(params, ADAMW)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, start))]
    assert len(set(pointers)) == len(pointers)
    floats = {x.dtype for x in jax.tree.leaves(start) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}
