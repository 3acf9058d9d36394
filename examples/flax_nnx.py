"""Train a small network of Flax NNX on scikit-learn's digits, so that nothing can take more than one interval away.

    python examples/flax_nnx.py runs/nnx

Kill it whenever you like and start it again with the same command: it goes on where it was, bit for bit.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from holdfast import Checkpointer, EarlyStopping, ResumableSampler, best, every, last

BATCH, EPOCHS, TRAINING_IMAGES = 64, 6, 1408
STEPS_PER_EPOCH = TRAINING_IMAGES // BATCH


class Network(nnx.Module):
    """Convolution, batch norm and dropout: parameters, statistics and a random stream, all of it state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 16, 64, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(images))), (2, 2), (2, 2))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.out(self.drop(x))


def loss_of(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, noise: nnx.Rngs, images: jax.Array, labels: jax.Array
) -> jax.Array:
    images = images + 0.1 * noise.normal(images.shape)
    loss, grads = nnx.value_and_grad(loss_of)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluate(model: Network, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return mean loss and accuracy."""
    logits = model(images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(1) == labels).mean()


def train(url: str) -> None:
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, val = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]

    model = Network(nnx.Rngs(params=0, dropout=1))
    schedule = optax.cosine_decay_schedule(3e-3, EPOCHS * STEPS_PER_EPOCH)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    noise = nnx.Rngs(2)
    data = ResumableSampler(train, batch_size=BATCH, seed=0)

    ckpt = Checkpointer(
        url,
        state={"model": model, "optimizer": optimizer, "noise": noise, "data": data},
        save=every(steps=25) | best("val_loss", mode="min"),
        keep=last(3) | best("val_loss", mode="min", k=2),
        stop=EarlyStopping("val_loss", mode="min", patience=4, min_delta=0.001),
    )
    for step, batch in ckpt.steps(EPOCHS * STEPS_PER_EPOCH, data=data):
        chosen = train[np.asarray(batch)]
        model.train()
        loss = train_step(model, optimizer, noise, jnp.asarray(images[chosen]), jnp.asarray(labels[chosen]))
        ckpt.log(loss=loss)
        if (step + 1) % STEPS_PER_EPOCH == 0:
            model.eval()
            val_loss, accuracy = evaluate(model, jnp.asarray(images[val]), jnp.asarray(labels[val]))
            ckpt.log(val_loss=val_loss, accuracy=accuracy)
        print(f"step {step + 1} loss {float(loss).hex()}", flush=True)

    print(f"finished at step {ckpt.step}: {ckpt.stopped.reason if ckpt.stopped else 'all epochs are done'}")
    ckpt.restore("best")
    model.eval()
    val_loss, accuracy = evaluate(model, jnp.asarray(images[val]), jnp.asarray(labels[val]))
    print(f"best is step {ckpt.step}: val_loss {val_loss:.4f}, accuracy {accuracy:.1%}")
    ckpt.close()


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/nnx")
