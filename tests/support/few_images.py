"""A data set in place of the synthetic one, where 1,000 and 200 images of noise are enough."""

import torch


def make():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1200, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.arange(1200) % 10
    return [images[:1000], labels[:1000], images[1000:], labels[1000:]]
