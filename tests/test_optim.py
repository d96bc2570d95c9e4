import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax.config import OptimConfig
from gravlens_jax.optim import learning_rate_schedule, make_optimizer, plateau_reduction


def pytorch_plateau(losses, patience, learning_rate, factor=0.1):
    """torch.optim.lr_scheduler.ReduceLROnPlateau (mode min, threshold 1e-4 relative, no cooldown), from its manual."""
    best, bad, scale, scales = float("inf"), 0, 1.0, []
    for loss in losses:
        best, bad = (loss, 0) if loss < best * (1 - 1e-4) else (best, bad + 1)
        if bad > patience:
            scale, bad = scale * factor, 0
        scales.append(max(scale, min(1, 1e-8 / learning_rate)))  # it makes no change by less than 1e-8
    return scales


@pytest.mark.parametrize("patience, learning_rate", [(0, 1.0), (1, 1.0), (3, 1.0), (0, 1e-9)])
def test_plateau_is_pytorch_s(patience, learning_rate):
    config = OptimConfig(plateau_patience=patience, learning_rate=learning_rate)
    plateau = plateau_reduction(config)
    update = jax.jit(lambda state, loss: plateau.update({}, state, value=loss)[1])
    for losses in np.random.default_rng(0).uniform(0.5, 1, (5, 25)).astype(np.float32):
        state, scales = plateau.init({"w": jnp.zeros(())}), []
        for loss in losses:
            state = update(state, loss)
            scales.append(float(state.scale))
        np.testing.assert_allclose(scales, pytorch_plateau(losses.tolist(), patience, learning_rate), rtol=1e-5)


def test_l2_is_added_to_the_gradient_before_adam():
    tx = make_optimizer(OptimConfig("adam", 0.1, weight_decay=0.01, warmup_steps=0, decay="constant"), 10)
    w = jnp.array([2.0, -1.0])
    opt_state, expected, m, v = tx.init(w), np.array([2.0, -1.0]), 0, 0
    for t in range(1, 6):
        gradient = np.array([0.3, -0.2]) * t
        updates, opt_state = tx.update(jnp.float32(gradient), opt_state, w)
        w = w + updates
        gradient = gradient + 0.01 * expected  # Kingma & Ba, algorithm 1, on the regularized loss
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(w, expected, rtol=1e-5)


def test_muon_updates_of_kernels_are_orthogonal_and_the_others_are_adam_s():
    tx = make_optimizer(OptimConfig("muon", 0.1, weight_decay=0.5, warmup_steps=0, decay="constant"), 10)
    shapes = {"kernel": (3, 3, 8, 16), "first": (3, 3, 1, 16), "scale": (16,), "head": (16, 3)}
    params = {name: jnp.full(shape, 0.01) for name, shape in shapes.items()}
    gradients = {name: jax.random.normal(jax.random.key(0), shape) for name, shape in shapes.items()}
    updates, _ = tx.update(gradients, tx.init(params), params)
    kernel = np.asarray(updates["kernel"] + 0.1 * 0.5 * params["kernel"]).reshape(72, 16)
    singular_values = np.linalg.svd(kernel, compute_uv=False) / 0.1
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3  # five Newton-Schulz iterations
    for name in ("first", "scale", "head"):  # Adam's first step is the learning rate in the gradient's direction
        np.testing.assert_allclose(updates[name], -0.01 * np.sign(gradients[name]), rtol=1e-3)


def test_cosine_and_constant_schedules_warm_up_linearly():
    schedule = learning_rate_schedule(OptimConfig(learning_rate=1.0, warmup_steps=4, decay="cosine"), 12)
    rates = jax.vmap(schedule)(jnp.arange(13))
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[4:], 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8)), atol=1e-6)
    for steps in (0, 1, 50):
        constant = learning_rate_schedule(OptimConfig(learning_rate=0.5, warmup_steps=steps, decay="constant"), 10)
        assert [float(constant(step)) for step in (0, 100)] == pytest.approx([0.5 / max(1, steps), 0.5])
