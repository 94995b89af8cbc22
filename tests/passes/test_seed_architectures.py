"""What the papers behind the models are made of, as tiny modules: every matmul weight is packed under strict.

BASE and DEMix route to experts, MEGABYTE reads patches of bytes, Mega averages along the sequence, DeLighT has
linears in groups, a biLM runs LSTMs both ways, MoMa has experts for each modality, CLIP is nn.MultiheadAttention
over patches beside a text model that is projected by a bare parameter.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kbitc
from kbitc.tensor import KbitTensor

WIDTH = 16


def feed_forward():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))


class Base(nn.Module):
    """BASE layers (2103.16716): balanced assignment, so that each expert gets as many tokens as the others."""

    def __init__(self, experts=4):
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(experts, WIDTH))
        self.first = nn.Parameter(torch.randn(experts, WIDTH, 32) / 4)
        self.second = nn.Parameter(torch.randn(experts, 32, WIDTH) / 4)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        scores = tokens @ self.centroids.mT
        # Tokens in the order of their expert, cut into equal parts: a greedy form of the assignment.
        order = scores.argmax(-1).argsort(stable=True)
        parts = tokens[order].unflatten(0, (len(self.centroids), -1))
        hidden = torch.bmm(torch.bmm(parts, self.first).relu(), self.second)
        pairs = zip(parts, self.centroids, strict=True)
        gate = torch.stack([torch.mv(tokens, centroid) for tokens, centroid in pairs]).sigmoid()
        return (parts + gate[..., None] * hidden).flatten(0, 1)[order.argsort()].view_as(x)


class Demix(nn.Module):
    """DEMix layers (2108.05036): a feed-forward for each domain, mixed by the domain's posterior."""

    def __init__(self, domains=3):
        super().__init__()
        self.experts = nn.ModuleList(feed_forward() for _ in range(domains))

    def forward(self, x, posterior):
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return x + torch.einsum("btdn,bn->btd", outputs, posterior)


class Megabyte(nn.Module):
    """MEGABYTE (2305.07185): a global model over patches of bytes, a local one inside each patch."""

    def __init__(self, patch=4):
        super().__init__()
        self.patch = patch
        self.bytes = nn.Embedding(256, WIDTH)
        self.local_bytes = nn.Embedding(256, WIDTH)
        self.wide = nn.TransformerEncoderLayer(patch * WIDTH, 4, 32, batch_first=True)
        self.narrow = nn.Linear(WIDTH, WIDTH)
        self.local = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)

    def forward(self, ids):
        patches = self.bytes(ids).unflatten(1, (-1, self.patch)).flatten(2)
        wide = self.wide(F.pad(patches, (0, 0, 1, 0))[:, :-1])
        context = self.narrow(wide.unflatten(-1, (self.patch, WIDTH)))
        local = context + self.local_bytes(ids).unflatten(1, (-1, self.patch))
        return self.local(local.flatten(0, 1)).view(*ids.shape, WIDTH) @ self.local_bytes.weight.mT


class Mega(nn.Module):
    """Mega (2209.10655): a damped moving average of several dimensions a feature, then gated attention."""

    def __init__(self, hidden=4):
        super().__init__()
        self.delta = nn.Parameter(torch.randn(WIDTH, hidden, 1))
        self.alpha = nn.Parameter(torch.randn(WIDTH, hidden, 1))
        self.expand = nn.Parameter(torch.randn(WIDTH, hidden, 1))
        self.project = nn.Parameter(torch.randn(WIDTH, hidden))
        self.residual = nn.Parameter(torch.randn(WIDTH))
        self.value, self.gate = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.shared = nn.Linear(WIDTH, 8)
        self.scale, self.shift = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(2, 8))
        self.out = nn.Linear(32, WIDTH)

    def average(self, x):
        length = x.shape[1]
        p, q = self.delta.sigmoid(), 1 - self.delta.sigmoid() * self.alpha.sigmoid()
        powers = p * self.expand * torch.exp(torch.arange(length) * torch.log(q))
        kernel = torch.einsum("dnl,dn->dl", powers, self.project * (1 / math.sqrt(self.project.shape[1])))
        size = 2 * length
        spectrum = torch.fft.rfft(x.mT, n=size) * torch.fft.rfft(kernel, n=size)
        return F.silu(torch.fft.irfft(spectrum, n=size)[..., :length].mT + x * self.residual)

    def forward(self, x):
        averaged = self.average(x)
        shared = F.silu(self.shared(averaged))
        query, key = (shared[:, :, None] * self.scale + self.shift).unbind(2)
        attention = (query @ key.mT).relu().square() / x.shape[1]
        return x + self.out(self.gate(averaged).sigmoid() * (attention @ self.value(x)))


class Delight(nn.Module):
    """DeLighT (2008.00623): linears in groups whose features are shuffled between them."""

    def __init__(self, groups=(1, 2, 4)):
        super().__init__()
        sizes = [(count, WIDTH // count, WIDTH // count) for count in groups]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size) / 4) for size in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(count, 1, size)) for count, size, _ in sizes)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            grouped = tokens.unflatten(-1, (weight.shape[0], -1)).transpose(0, 1)
            mixed = torch.baddbmm(bias, grouped, weight).relu()
            tokens = mixed.permute(1, 2, 0).flatten(1)  # shuffled
        return tokens.view_as(x)


class BiLm(nn.Module):
    """A biLM (ELMo, 1802.05365): projected LSTMs both ways over the same embedding, and one softmax for both."""

    def __init__(self, words=30):
        super().__init__()
        self.embed = nn.Embedding(words, WIDTH)
        self.forwards = nn.LSTM(WIDTH, 24, 2, batch_first=True, proj_size=WIDTH)
        self.backwards = nn.LSTM(WIDTH, 24, 2, batch_first=True, proj_size=WIDTH)
        self.head = nn.Linear(WIDTH, words)

    def forward(self, ids):
        x = self.embed(ids)
        there, back = self.forwards(x)[0], self.backwards(x.flip(1))[0].flip(1)
        return self.head(there), self.head(back)


class Moma(nn.Module):
    """MoMa (2407.21770): experts of each modality; inside it each expert chooses its tokens."""

    def __init__(self, experts=2, capacity=3):
        super().__init__()
        self.capacity = capacity
        self.routers = nn.ParameterDict({name: torch.randn(experts, WIDTH) for name in ("text", "image")})
        self.experts = nn.ModuleDict(
            {name: nn.ModuleList(feed_forward() for _ in range(experts)) for name in ("text", "image")}
        )

    def forward(self, x, is_image):
        tokens = x.flatten(0, 1)
        mask = is_image.flatten()
        out = tokens
        for name, own in (("text", ~mask), ("image", mask)):
            scores = (tokens @ self.routers[name].mT).sigmoid() * own[:, None]
            for i, expert in enumerate(self.experts[name]):
                gate, chosen = scores[:, i].topk(self.capacity)
                out = out.index_add(0, chosen, gate[:, None] * expert(tokens[chosen]))
        return out.view_as(x)


class Clip(nn.Module):
    """CLIP (2103.00020) as OpenCLIP writes it: nn.MultiheadAttention, patches by a convolution, bare projections."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4, bias=False)
        self.image_class = nn.Parameter(torch.randn(WIDTH))
        self.image_places = nn.Parameter(torch.randn(5, WIDTH))
        self.image_projection = nn.Parameter(torch.randn(WIDTH, 8))
        self.words = nn.Embedding(20, WIDTH)
        self.text_places = nn.Parameter(torch.randn(6, WIDTH))
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 8))
        self.attention = nn.ModuleDict({n: nn.MultiheadAttention(WIDTH, 2) for n in ("image", "text")})
        self.mlp = nn.ModuleDict({name: feed_forward() for name in ("image", "text")})
        self.scale = nn.Parameter(torch.tensor(2.0))

    def block(self, x, name, mask=None):
        x = x.transpose(0, 1)
        x = x + self.attention[name](x, x, x, need_weights=False, attn_mask=mask)[0]
        return (x + self.mlp[name](x)).transpose(0, 1)

    def forward(self, image, ids):
        patches = self.patches(image).flatten(2).mT
        first = self.image_class.expand(len(patches), 1, -1)
        seen = self.block(torch.cat([first, patches], 1) + self.image_places, "image")
        causal = torch.full((6, 6), float("-inf")).triu(1)
        read = self.block(self.words(ids) + self.text_places, "text", causal)
        images = F.normalize(seen[:, 0] @ self.image_projection, dim=-1)
        texts = F.normalize(read[:, -1] @ self.text_projection, dim=-1)
        return self.scale.exp() * images @ texts.mT


def inputs(seed=1):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, WIDTH, generator=make)
    ids = torch.randint(0, 20, (2, 8), generator=make)
    return {
        Base: (x,),
        Demix: (x, torch.rand(2, 3, generator=make).softmax(-1)),
        Megabyte: (ids,),
        Mega: (x,),
        Delight: (x,),
        BiLm: (ids,),
        Moma: (x, torch.rand(2, 8, generator=make) > 0.5),
        Clip: (torch.randn(2, 3, 8, 8, generator=make), ids[:, :6]),
    }


@pytest.mark.parametrize("architecture", inputs(), ids=lambda made: made.__name__)
def test_every_matmul_weight_is_packed_and_outputs_are_the_dequantized_models(architecture):
    torch.manual_seed(0)
    model = architecture().eval().requires_grad_(requires_grad=False)
    given = inputs()[architecture]
    packed = kbitc.compile(model, spec="int6:8", example_inputs=given, strict=True)
    weights = {name: value for name, value in packed.named_parameters() if isinstance(value, KbitTensor)}
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d))
    }
    recurrent = {name for name, _ in model.named_parameters() if "weight_" in name}
    attention = {name for name, _ in model.named_parameters() if "in_proj_weight" in name}
    bare = {"centroids", "first", "second", "project", "image_projection", "text_projection"}
    bare = {name for name, _ in model.named_parameters() if name in bare or name.startswith("routers")}
    assert linears | recurrent | attention | bare <= set(weights)
    fresh = inputs(seed=2)[architecture]
    with torch.no_grad():
        got = torch.utils._pytree.tree_leaves(packed(*fresh))
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight.dequantize())
        wanted = torch.utils._pytree.tree_leaves(model(*fresh))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=4e-4, rtol=4e-4)
