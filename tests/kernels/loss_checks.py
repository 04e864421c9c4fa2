"""What the pieces of the loss are held to, against FP64 of the same outputs."""

import torch

from megaresnorm.kernels.cross_entropy import LogitForm, LossOfPieces, LossPieces, cross_entropy_sums, differentiate

FORMS = {
    "plain": lambda columns: LogitForm(columns),
    "padded and scaled": lambda columns: LogitForm(columns - columns // 7 - 1, 0.25),
    "capped": lambda columns: LogitForm(columns, 1.0, 3.0),
    "all": lambda columns: LogitForm(columns - 1, 1.5, 5.0),
}


def check_loss(pieces: LossPieces, rows: int, width: int, form: str, dtype, z_loss: float, ranks=1, device="cpu"):
    """Values and gradients, on one rank or with the vocabulary sharded over several. Raises AssertionError."""
    g = torch.Generator().manual_seed(rows + width)
    outputs = (4 * torch.randn(rows, width, generator=g)).to(dtype)
    whole = FORMS[form](width)
    labels = torch.randint(whole.columns, (rows,), generator=g)
    labels[:: max(2, rows // 3)] = -100
    scale = torch.tensor(0.37, dtype=torch.float64, device=device)
    exact = outputs.double().requires_grad_()
    nll, objective = cross_entropy_sums(whole(exact), labels, z_loss, 0.37)
    objective.backward()
    shares, share = outputs.chunk(ranks, dim=1), width // ranks
    leaves = [part.contiguous().to(device).requires_grad_() for part in shares]
    forms = [whole._replace(columns=min(share, whole.columns - i * share)) for i in range(ranks)]
    local = [labels.to(device) - i * share * (labels.to(device) >= 0) for i in range(ranks)]
    statistics = [
        pieces(leaf.detach().clone(), y, f, False)[0] for leaf, y, f in zip(leaves, local, forms, strict=True)
    ]
    got = []
    for i, leaf in enumerate(leaves):
        loss = LossOfPieces(pieces, forms[i], i * share, whole.columns, lambda mine: torch.stack(statistics))
        found = loss(leaf * 1.0, labels.to(device), z_loss, scale)
        differentiate(found[1])
        for mine, wanted in zip(found, (nll, objective), strict=True):
            torch.testing.assert_close(mine.cpu().double(), wanted.detach(), rtol=2e-6, atol=1e-5)
        got.append(leaf.grad)
    gradient = torch.cat(got, dim=1).cpu().double()
    once = (exact.grad.to(dtype).double() - exact.grad).norm()
    bound = 2e-6 * exact.grad.norm() + 1e-12 if dtype == torch.float32 else 1.5 * once
    assert (gradient - exact.grad).norm() <= bound, (form, dtype, z_loss, ranks)
    assert not gradient[labels < 0].any() and not gradient[:, whole.columns :].any()
