"""How the two products of Eq. 7 and 8 agree, in every precision, and what they cost.

    python benchmarks/products.py

The second-order term d2 L_train / (d alpha d w) . v of a supernet at initialisation, by the finite
difference of Eq. 8 and exactly, each in 64, 32 and 16 bits (mixed precision): the cosine of its
angle to the exact one in 64 bits, to the finite difference in 64 bits, and the norm of the
difference to the exact one relative to that one's. v is the gradient of the validation loss in the
same precision. The finite difference itself runs in full precision (see `dartsl.hypergradient`); in
the last rows it is kept in half, to show why.
"""

import argparse
import contextlib
import copy

import torch
import torch.nn.functional as F
from measuring import Report, milliseconds, parser, print_surroundings, start, surroundings, write
from torch import Tensor

from dartsl.hypergradient import exact_product, finite_difference_product
from dartsl.networks import Supernet
from dartsl.search_space import SearchSpace

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("64", "32", *HALVES)
Batch = tuple[Tensor, Tensor]


class Term:
    """The second-order term of one supernet in one precision."""

    def __init__(self, network: Supernet, precision: str, args: argparse.Namespace) -> None:
        dtype = torch.float64 if precision == "64" else torch.float32
        self.network = copy.deepcopy(network).to(args.device, dtype)
        self.weights = self.network.weight_parameters()
        self.half = HALVES.get(precision)
        self.device = args.device
        generator = torch.Generator().manual_seed(1)
        shape = args.batch_size, 3, args.image_size, args.image_size
        train, val = (
            (
                torch.randn(shape, generator=generator).to(args.device, dtype),
                torch.randint(10, shape[:1], generator=generator).to(args.device),
            )
            for _ in range(2)
        )
        self.train = train
        with self.autocast():
            loss = self.loss(val)
        self.vector = torch.autograd.grad(loss, self.weights)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision of losses."""
        return torch.autocast(self.device, self.half, enabled=self.half is not None)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy."""
        torch.clear_autocast_cache()
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def loss_in_half(self, batch: Batch) -> Tensor:
        """The same where autocast was switched off."""
        with self.autocast():
            return self.loss(batch)

    def product(self, exact: bool, in_half: bool = False) -> Tensor:
        """The term, in one row; `in_half` keeps the finite difference in half precision."""
        function = exact_product if exact else finite_difference_product
        loss = self.loss_in_half if in_half else self.loss
        with self.autocast():
            found = function(
                lambda: loss(self.train),
                self.weights,
                self.network.arch_parameters(),
                self.vector,
            )
        return torch.cat([part.flatten() for part in found]).double().cpu()


def main() -> None:
    """Measure, print, and write the report."""
    options = parser(__doc__)
    options.add_argument("--channels", type=int, default=16)
    options.add_argument("--cells", type=int, default=8)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--image-size", type=int, default=32)
    args = options.parse_args()
    start(args)
    network = Supernet(SearchSpace(), args.channels, args.cells)
    terms = {precision: Term(network, precision, args) for precision in PRECISIONS}
    found = {
        (name, precision): term.product(exact)
        for precision, term in terms.items()
        for name, exact in (("exact", True), ("finite difference", False))
    }
    for precision in HALVES:
        found["all in half", precision] = terms[precision].product(exact=False, in_half=True)
    exact, difference = found["exact", "64"], found["finite difference", "64"]
    rows = {
        f"{name}, {precision} bits" if precision in ("64", "32") else f"{name}, {precision}": {
            "cosine to exact": torch.cosine_similarity(term, exact, dim=0).item(),
            "cosine to difference": torch.cosine_similarity(term, difference, dim=0).item(),
            "relative difference": ((term - exact).norm() / exact.norm()).item(),
        }
        for (name, precision), term in found.items()
    }
    times = {
        name: milliseconds(lambda exact=exact: terms["32"].product(exact), args)
        for name, exact in (("exact", True), ("finite difference", False))
    }
    report: Report = {"surroundings": surroundings(args), "rows": rows, "milliseconds": times}
    print_surroundings(report)
    print(f"{'':30}" + "".join(f"{column:>22}" for column in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{value:22.4f}" for value in row.values()))
    print("  ".join(f"{name}: {ms:,.0f} ms in 32 bits" for name, ms in times.items()))
    write(report, args)


if __name__ == "__main__":
    main()
