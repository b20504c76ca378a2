"""How a step changes the weights: the optimizers, and the learning rate of each step.

SGD, Adam and AdamW compute what those of torch.optim do. They call the functions behind its
classes, because the classes import torch.compile, which takes a second and 140 MiB, and spend a
tenth of a step of 4 images on bookkeeping.
"""

import math

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


class Optimizer:
    """What the optimizers share: the parameters of a model, their gradients, the learning rate.

    lr is a float tensor () on the device, to be filled before a step: a CUDA graph would not see
    a Python number change. Of args they use lr, momentum and weight_decay.
    """

    def __init__(self, args, model):
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.momentum = args.momentum
        self.settings = {"weight_decay": args.weight_decay, "maximize": False, "fused": True}
        self.averages = [torch.zeros_like(parameter) for parameter in self.parameters]
        device = self.parameters[0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # as the functions want it
        self.lr = torch.tensor(args.lr, dtype=dtype, device=device)

    def zero_grad(self):
        """Forget the gradients, so that the next backward() does not add to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self):
        """Return the gradient of each parameter, 0 for one that the loss does not depend on."""
        return [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters
        ]


class SGD(Optimizer):
    """torch.optim.SGD, by default in all but the hyperparameters."""

    @torch.no_grad()
    def step(self):
        """Change the parameters by their gradients."""
        self.descend(self.momentum)

    def descend(self, momentum):
        """Do a step of SGD with this momentum."""
        state = [self.parameters, self.gradients(), self.averages]
        sgd(*state, lr=self.lr, momentum=momentum, dampening=0, nesterov=False, **self.settings)


class Adam(Optimizer):
    """torch.optim.Adam, by default in all but the hyperparameters; momentum is its beta1."""

    function = staticmethod(adam)

    def __init__(self, args, model):
        super().__init__(args, model)
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        # Counted in 32 bits, as the functions want it, also where the parameters have 64.
        zero = torch.zeros((), dtype=torch.float32, device=self.lr.device)
        self.steps = [zero.clone() for _ in self.parameters]

    @torch.no_grad()
    def step(self):
        """Change the parameters by their gradients."""
        state = [self.parameters, self.gradients(), self.averages, self.squares, [], self.steps]
        betas = {"beta1": self.momentum, "beta2": 0.999}
        self.function(*state, lr=self.lr, **betas, eps=1e-8, amsgrad=False, **self.settings)


class AdamW(Adam):
    """torch.optim.AdamW, in the same way."""

    function = staticmethod(adamw)


class Muon(SGD):
    """SGD with Nesterov momentum whose step is made orthogonal for each layer's weights.

    https://kellerjordan.github.io/posts/muon/ is its source. torch.optim.Muon, there since torch
    2.9, refuses the weights of convolutions, computes in 16 bits, and does 5 rounds for our 2: for
    the weights of this network it takes 3.2 ms of one thread of an AMD EPYC, and this one 1.2 ms.
    """

    @torch.no_grad()
    def step(self):
        """Change the parameters by their gradients, which are overwritten."""
        for gradient, average in zip(self.gradients(), self.averages, strict=True):
            average.mul_(self.momentum).add_(gradient)
            gradient.add_(average, alpha=self.momentum)
            if gradient.ndim > 1:  # not a bias
                gradient.copy_(orthogonalize(gradient.flatten(1)).view(gradient.shape))
        self.descend(momentum=0)  # the gradients have theirs


def orthogonalize(matrix):
    """Return the matrix (n, m) with its singular values all made about 1, from 0.78 to 1.22.

    Those below 0.05 * sqrt(norm of the Gram matrix), a little more than a twentieth of the largest,
    end lower. It is Muon's iteration, with the coefficients that are best for two rounds by Polar
    Express (https://arxiv.org/abs/2505.16932), and on the Gram matrix, which is smaller.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    gram = matrix @ matrix.T
    size = gram.norm() + 1e-14  # >= the largest singular value's square, as the coefficients need
    gram = gram / size
    first = polynomial(gram, 6.7524, -18.3510, 13.2633)
    second = polynomial(first @ gram @ first, 2.5379, -1.8747, 0.4413)
    return (second @ first).div_(size.sqrt()) @ matrix


def polynomial(matrix, a, b, c):
    """Return a + b * matrix + c * matrix ** 2, of a symmetric matrix (n, n)."""
    result = torch.addmm(matrix, matrix, matrix, beta=b, alpha=c)
    result.diagonal().add_(a)
    return result


def learning_rates(args, steps):
    """Yield the learning rate of each of so many steps, as args.lr and args.lr_schedule have it."""
    schedule = LR_SCHEDULES[args.lr_schedule]
    for done in range(steps):
        yield schedule(args.lr, done, steps)


def constant(lr, done, steps):
    """Return lr: the same learning rate for every step."""
    return lr


def cosine(lr, done, steps):
    """Return the learning rate after so many done of all steps: it falls from lr towards 0.

    That of torch's CosineAnnealingLR.
    """
    return arc(lr, 0, done / steps)


def one_cycle(lr, done, steps):
    """Return the learning rate after so many done of all steps: it rises to lr, then falls.

    That of torch's OneCycleLR by default, which rises in the first 30 % of the steps. Of 3 steps or
    fewer none is in the rise. The momentum stays: it is a hyperparameter of its own.
    """
    top = 0.3 * steps - 1
    if done <= top:
        return arc(lr / 25, lr, done / top)
    return arc(lr, lr / 250_000, (done - top) / (steps - 1 - top))


def arc(start, end, way):
    """Return where half a wave of a cosine is between start and end, at 0 <= way <= 1."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * way))


OPTIMIZERS = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW, "Muon": Muon}
LR_SCHEDULES = {"constant": constant, "cosine": cosine, "one_cycle": one_cycle}
