"""The optimizers, and the learning rate of each step.

For one more, add a subclass of Optimizer with step() to OPTIMIZERS, or a function to LR_SCHEDULES.
SGD, Adam and AdamW call the functions behind torch.optim's classes, so they compute the same. The
classes import torch.compile, for a second and 140 MiB, and slow each step down by bookkeeping.
"""

import math

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class Optimizer:
    """The common part of the optimizers: a model's parameters, their gradients, the settings.

    lr is a float tensor () on the device, because a CUDA graph does not notice that a Python number
    changes. optimizer.lr.fill_(number) changes it.
    """

    def __init__(self, parameters, lr, momentum, weight_decay):
        self.parameters = [each for each in parameters if each.requires_grad]
        self.momentum = momentum
        self.settings = {"weight_decay": weight_decay, "maximize": False, "fused": True}
        self.averages = [torch.zeros_like(parameter) for parameter in self.parameters]
        device = self.parameters[0].device
        # sgd() and adam() need these types.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.lr = torch.full((), lr, dtype=dtype, device=device)

    def zero_grad(self):
        """Forget the gradients, so that the next backward() does not add to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self):
        """Return each parameter's gradient: 0 if the loss does not depend on the parameter."""
        return [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters
        ]


class SGD(Optimizer):
    """torch.optim.SGD with these settings, and torch's defaults for the others."""

    @torch.no_grad()
    def step(self):
        """Update the parameters from their gradients."""
        self.descend(self.momentum)

    def descend(self, momentum):
        """Do a step of SGD with this momentum."""
        state = [self.parameters, self.gradients(), self.averages]
        sgd(*state, lr=self.lr, momentum=momentum, dampening=0, nesterov=False, **self.settings)


class Adam(Optimizer):
    """torch.optim.Adam with these settings, momentum as beta1, and torch's other defaults."""

    function = staticmethod(adam)

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, lr, momentum, weight_decay)
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        # adam() counts steps in 32 bits, even if the parameters have 64.
        zero = torch.zeros((), dtype=torch.float32, device=self.lr.device)
        self.steps = [zero.clone() for _ in self.parameters]

    @torch.no_grad()
    def step(self):
        """Update the parameters from their gradients."""
        state = [self.parameters, self.gradients(), self.averages, self.squares, [], self.steps]
        betas = {"beta1": self.momentum, "beta2": 0.999}
        self.function(*state, lr=self.lr, **betas, eps=1e-8, amsgrad=False, **self.settings)


class AdamW(Adam):
    """torch.optim.AdamW with the same settings as Adam."""

    function = staticmethod(adamw)


class Muon(SGD):
    """SGD with Nesterov momentum that makes the step of each layer's weights orthogonal.

    See https://kellerjordan.github.io/posts/muon/. torch.optim.Muon, new in torch 2.9, refuses the
    weights of convolutions, and its step takes nearly three times as long for this network: it does
    5 rounds, where 2 are enough.
    """

    @torch.no_grad()
    def step(self):
        """Update the parameters. Overwrites the gradients."""
        for gradient, average in zip(self.gradients(), self.averages, strict=True):
            average.mul_(self.momentum).add_(gradient)
            gradient.add_(average, alpha=self.momentum)
            if gradient.ndim > 1:  # not a bias
                gradient.copy_(orthogonalize(gradient.flatten(1)).view(gradient.shape))
        self.descend(momentum=0)  # the gradients hold the momentum already


def orthogonalize(matrix):
    """Return the matrix (n, m) with its singular values changed to about 1: 0.78 to 1.22.

    The smallest ones, below 0.05 * sqrt(norm of the Gram matrix), stay smaller. This is Muon's
    iteration with two rounds. It works on the Gram matrix, which is smaller than the matrix. The
    coefficients come from Polar Express (https://arxiv.org/abs/2505.16932).
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    gram = matrix @ matrix.T
    size = gram.norm() + 1e-14  # at least the square of the largest singular value
    gram = gram / size
    first = polynomial(gram, 6.7524, -18.3510, 13.2633)
    second = polynomial(first @ gram @ first, 2.5379, -1.8747, 0.4413)
    return (second @ first).div_(size.sqrt()) @ matrix


def polynomial(matrix, a, b, c):
    """Return a + b * matrix + c * matrix ** 2 for a symmetric matrix (n, n)."""
    result = torch.addmm(matrix, matrix, matrix, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


def cosine(lr, done, steps):
    """Return the learning rate after done steps: from lr towards 0, as CosineAnnealingLR."""
    return interpolate(lr, 0, done / steps)


def one_cycle(lr, done, steps):
    """Return the learning rate after done steps: it rises to lr, then falls.

    The same as torch's OneCycleLR with its defaults: it rises in the first 30 % of the steps, and
    not at all if there are 3 steps or fewer. Unlike there, the momentum does not change.
    """
    peak = 0.3 * steps - 1
    if done <= peak:
        return interpolate(lr / 25, lr, done / peak)
    return interpolate(lr, lr / 250_000, (done - peak) / (steps - 1 - peak))


def interpolate(start, end, progress):
    """Return the cosine interpolation from start (progress 0) to end (progress 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


OPTIMIZERS = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW, "Muon": Muon}
LR_SCHEDULES = {"constant": lambda lr, done, steps: lr, "cosine": cosine, "one_cycle": one_cycle}
