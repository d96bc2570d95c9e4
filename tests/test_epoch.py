import jax.numpy as jnp
import numpy as np
import pytest

from gravlens_jax import epoch
from gravlens_jax.config import CLASSES, Config
from gravlens_jax.mesh import data_mesh
from gravlens_jax.npz import Dataset
from gravlens_jax.steps import TrainState


def count(state, steps, images):
    return state._replace(step=state.step + steps), {
        "loss": jnp.ones(steps),
        "correct": 0.0,
        "count": jnp.float32(images),
    }


@pytest.mark.parametrize("device_data", [False, True])
def test_an_epoch_is_saved_after_every_step_but_the_last_which_does_not_end_it(monkeypatch, device_data):
    monkeypatch.setattr(epoch, "STEPS_PER_CALL", 1)
    monkeypatch.setattr(epoch, "train_step", lambda state, batch, **_: count(state, 1, len(batch["labels"])))
    monkeypatch.setattr(epoch, "train_steps", lambda state, held, rows, **_: count(state, len(rows), rows.size))
    config, devices, saved = Config(batch_size=2, device_data=device_data), data_mesh(1), []
    images = np.zeros((7, 4, 4), np.float32)
    dataset = epoch.place(Dataset(images, np.arange(7, dtype=np.int32) % 3, CLASSES, {}), config, devices)

    def save(state, sums):
        saved.append((int(state.step), sums["count"]))

    train_epoch = epoch.make_train_epoch(config, None, None, devices)
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {}, {})
    state, sums = train_epoch(state, dataset, 0, 0, epoch.no_sums(), due=lambda: True, save=save)
    assert saved == [(1, 2), (2, 4)]
    assert int(state.step) == 3 and sums == {"loss": 3, "correct": 0, "count": 6}
