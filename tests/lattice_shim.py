"""ops.Lattice and ops.mean_field over the reference, where ribfast.ops has none."""

import torch

from ribfast import ops, reference


class Lattice:
    """reference.Lattice with the vertices that pydensecrf makes beside those of the points: it elevates points four at
    a time, and fills the last group up with points at 0, whose vertices pass on what blurring brings them."""

    def __init__(self, features):
        self.points = len(features)
        self.filler = features.new_zeros(-self.points % 4, features.shape[1])
        self.lattice = reference.Lattice(torch.cat([features, self.filler]))

    def filter(self, values):
        nothing = values.new_zeros(len(self.filler), values.shape[1])
        return self.lattice.filter(torch.cat([values, nothing]))[: self.points]


def mean_field(unary, lattices, strengths, *, normalizations="symmetric", iterations=10, exact=False, nan="error"):
    names = [normalizations] * len(lattices) if isinstance(normalizations, str) else normalizations
    energies = -unary.float().T
    q = energies.softmax(1)
    terms = []
    for lattice, strength, name in zip(lattices, strengths, names, strict=True):
        mass = lattice.filter(torch.ones(len(q), 1)) + 1e-20
        before = {"symmetric": mass.rsqrt(), "before": 1 / mass}.get(name, 1.0)
        after = {"symmetric": mass.rsqrt(), "after": 1 / mass}.get(name, 1.0)
        terms.append((lattice, strength, before, after))
    for _ in range(iterations):
        q = (energies + sum(w * after * k.filter(before * q) for k, w, before, after in terms)).softmax(1)
    return q.T


if not hasattr(ops, "mean_field"):
    ops.Lattice, ops.mean_field = Lattice, mean_field
