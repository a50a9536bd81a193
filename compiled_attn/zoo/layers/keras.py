"""Layers with the parameter names and memory order of Keras, so that its checkpoints fit key for key."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dense(nn.Module):
    """x kernel + bias; kernel [in, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(in_features, out_features)))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel.T, self.bias)


class Conv1D(nn.Module):
    """Convolution along N of x [B, N, in], zeros beyond the border ("same", an odd size); kernel [size, in, out]."""

    def __init__(self, in_features: int, out_features: int, size: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(size, in_features, out_features)))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel.permute(2, 1, 0)
        return F.conv1d(x.transpose(1, 2), weight, self.bias, padding=self.kernel.shape[0] // 2).transpose(1, 2)


class LayerNormalization(nn.Module):
    """LayerNorm over the last dimension; gamma scales, beta shifts."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.gamma, self.beta, self.epsilon)


class Embedding(nn.Module):
    """Rows of embeddings [vocabulary, C] by number."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(nn.init.uniform_(torch.empty(vocabulary, width), -0.05, 0.05))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embeddings)
