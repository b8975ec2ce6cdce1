"""Second derivatives on `sami_fast.ops`: a gradient penalty, and the product of a Hessian and a vector.

    python examples/derivatives.py

Torch's own fused attention stops after one derivative. `ops.attention` and `ops.group_norm_silu` have two, in memory linear in the tokens.
"""

import torch
from torch import Tensor, nn

from sami_fast import ops


class Critic(nn.Module):
    """Images [B, 3, H, W] -> one number each, [B]: a convolution, norm and SiLU, attention among all pixels."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.qkv = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3 * width, 1)
        self.norm, self.last = nn.GroupNorm(4, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = ops.group_norm_silu(h, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)
        q, k, v = self.qkv(h).flatten(2).mT.unflatten(2, (3, self.heads, -1)).unbind(2)  # [B, S, N, D] each
        return self.last(ops.attention(q, k, v).flatten(2).mean(1)).squeeze(1)


def gradient_penalty(critic: nn.Module, x: Tensor) -> Tensor:
    """Mean of (|grad_x critic(x)| - 1)^2, differentiable in the critic's parameters."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def hessian_vector_product(critic: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """H v, H the Hessian of the sum of critic(x) in x. Shape of x."""
    return torch.autograd.functional.hvp(lambda x: critic(x).sum(), x, v)[1]


def main() -> None:
    torch.manual_seed(0)
    critic, x = Critic(), torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for step in range(1, 41):
        optimizer.zero_grad(set_to_none=True)
        penalty = gradient_penalty(critic, x)
        penalty.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: gradient penalty {penalty.item():.4f}")
    product = hessian_vector_product(critic, x, torch.randn_like(x))
    print(f"|H v| of each image: {', '.join(f'{norm:.4f}' for norm in product.flatten(1).norm(dim=1))}")


if __name__ == "__main__":
    main()
