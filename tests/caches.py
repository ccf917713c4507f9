"""The plainest cache that fits the protocol of `llmlib.attention.Cache`."""

import torch


class GrowingCache:
    """Keep every key and value."""

    def __init__(self):
        self.n_tokens, self.k, self.v = 0, None, None

    def update(self, k, v):
        if self.k is not None:
            k, v = torch.cat([self.k, k], dim=-2), torch.cat([self.v, v], dim=-2)
        self.n_tokens, self.k, self.v = k.shape[-2], k, v
        return k, v
