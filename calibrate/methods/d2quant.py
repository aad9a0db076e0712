"""D2Quant's two parts (arXiv 2602.02546): a scale of down_proj's input channels, and a shift behind the MLP norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calibrate.activations import Activations
from calibrate.methods import gptq
from calibrate.parallel import Share, add_up
from sliderquant_vllm.format import LinearScheme

ROUNDS = 6
RIDGE = 1e-2
LIMITS = (0.25, 4.0)


def settings(scheme: LinearScheme) -> dict:
    """Both parts on top of GPTQ."""
    return gptq.settings(scheme) | {"dual_scale": True, "correction": scheme.activations is None}


def dual_scale(weight: Tensor, second_moment: Tensor, round_weight: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The scale c of W ~ Q(W diag(1/c)) diag(c), alternating between codes and least squares.

    Given the dequantized codes V, c minimises tr((W - V diag c) H (W - V diag c)^T), that is it solves
    ((V^T V) o H) c = diag(H W^T V); a little ridge keeps what is hardly seen where it was. The best c of all rounds
    is kept.

    Args:
        weight: fp32 [N, K].
        second_moment: H [K, K], up to a factor.
        round_weight: the quantizer Q: a weight fp32 [N, K] and the second moment of what it meets -> fp32 [N, K].

    Returns:
        fp32 [K].
    """
    moment = second_moment.double()
    scale = torch.ones_like(weight[0])
    best, least = scale, torch.inf
    for _ in range(ROUNDS):
        values = round_weight(weight / scale, second_moment * scale * scale.unsqueeze(1)).double()
        difference = values * scale - weight
        error = ((difference @ moment) * difference).sum().item()
        if error < least:
            best, least = scale, error
        system = (values.T @ values) * moment
        right = ((weight.double().T @ values) * moment).sum(0)
        ridge = RIDGE * system.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        energy = system.diagonal().clone()
        system.diagonal().add_(ridge)
        fitted = torch.linalg.solve(system, right + ridge * scale).clamp(*LIMITS)
        # Least squares shrinks towards 0 what it cannot fit; the output's magnitude has to stay.
        scale = (fitted * (scale * energy).sum() / (fitted * energy).sum()).float()
    return best


@torch.no_grad()
def deviation(block, inputs: Activations, targets: Activations, position_embeddings: tuple, share: Share) -> Tensor:
    """Mean over tokens of the MLP norm's output in 16 bits minus that of the block as it is prepared, fp32 [hidden].

    Args:
        block: CalibrationBlock, prepared up to its attention, the scale of its MLP norm still 1; released afterwards.
        inputs: of the quantized model; targets: of the 16-bit one.
    """
    norm = block.norms[block.layout.mlp_norm]
    sums = []
    hook = norm.register_forward_hook(lambda module, args, output: sums.append(output.flatten(0, -2).sum(0).double()))
    for _, batch in inputs.consecutive(1):
        block(batch, position_embeddings)
    quantized = torch.stack(sums).sum(0)
    sums.clear()
    block.release()
    for _, batch in targets.consecutive(1):
        block(batch, position_embeddings)
    hook.remove()
    difference = torch.stack(sums).sum(0) - quantized
    add_up(difference)
    return (difference / (share.samples * inputs.shape[1])).float()
