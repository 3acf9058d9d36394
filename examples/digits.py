"""Train a small convolutional network on scikit-learn's digits, so that nothing can take more than one interval away.

    python examples/digits.py runs/digits

Kill it whenever you like and start it again with the same command: it goes on where it was, bit for bit.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from holdfast import Checkpointer, EarlyStopping, ResumableSampler, best, every, last

BATCH, EPOCHS, TRAINING_IMAGES = 64, 40, 1408
STEPS_PER_EPOCH = TRAINING_IMAGES // BATCH


class Digits(torch.utils.data.Dataset):
    """8 x 8 images with labels; training images are shifted, rotated a little and made noisy at random."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.augment:  # three kinds of randomness, in a worker process: all of it resumes exactly
            image = np.roll(image, (random.randint(-1, 1), random.randint(-1, 1)), axis=(0, 1))
            image = image * np.random.uniform(0.8, 1.2)
            noise = torch.randn(8, 8) * 0.1
        else:
            noise = torch.zeros(8, 8)
        return torch.from_numpy(image).float().unsqueeze(0) + noise, int(self.labels[index])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Return mean loss and accuracy on the whole data set."""
    model.eval()
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    logits, targets = model(torch.stack(images)), torch.tensor(labels)
    model.train()
    loss = nn.functional.cross_entropy(logits, targets)
    return loss.item(), (logits.argmax(1) == targets).float().mean().item()


def datasets() -> tuple[Digits, Digits]:
    """Return training and validation data: a fixed split of the 1,797 digits."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    order = np.random.default_rng(0).permutation(len(labels))
    train, val = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return Digits(images[train], labels[train], augment=True), Digits(images[val], labels[val], augment=False)


def train(url: str) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    train_set, val_set = datasets()
    loader = ResumableSampler(train_set, batch_size=BATCH, seed=0).loader(
        num_workers=2, persistent_workers=True
    )
    total = EPOCHS * STEPS_PER_EPOCH

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2 * STEPS_PER_EPOCH)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 2 * STEPS_PER_EPOCH)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [2 * STEPS_PER_EPOCH])

    ckpt = Checkpointer(
        url,
        state={"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": loader},
        save=every(steps=25) | best("val_loss", mode="min"),
        keep=last(3) | best("val_loss", mode="min", k=2) | every(steps=100),
        stop=EarlyStopping("val_loss", mode="min", patience=6, min_delta=0.001),
    )
    for step, (images, labels) in ckpt.steps(total, data=loader):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        ckpt.log(loss=loss)
        if (step + 1) % STEPS_PER_EPOCH == 0:
            val_loss, accuracy = evaluate(model, val_set)
            ckpt.log(val_loss=val_loss, accuracy=accuracy)
        print(f"step {step + 1}", flush=True)

    why = ckpt.stopped.reason if ckpt.stopped else "all epochs are done"
    print(f"finished at step {ckpt.step}: {why}")
    ckpt.restore("best")
    val_loss, accuracy = evaluate(model, val_set)
    print(f"best is step {ckpt.step}: val_loss {val_loss:.4f}, accuracy {accuracy:.1%}")
    ckpt.close()


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
