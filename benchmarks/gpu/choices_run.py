# SPDX-License-Identifier: Apache-2.0
"""The work behind choices.py: statistics and codes for every choice, all on one GPU."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from choices_list import GROUPS, SHRINKAGE, Choice, Way
from choices_tune import Coded, tune
from torch import Tensor
from torch_ernie import LAYER, Ernie, Taps, Weights, compare, expert_key, in_wint8

from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.encoder.ldlq import LDLQ_RECIPES, LdlqRecipe, books, prepare
from paddle_ccq.encoder.ldlq_metric import make_metric
from paddle_ccq.ops.gpu_ldlq import ldlq

UP, DOWN = "up_gate_proj", "down_proj"
AT_ONCE = 8
# Groups of output channels whose tokens are weighed apart, by Choice.weights.
APART = {"router": 1, "gradient": 1, "root": 1, "halves": 2, "groups": GROUPS}
Key = tuple[str, str, int, str, int]  # weights, part of the text, layer, projection, group


class Hessians(Taps):
    """Hessians of every expert's inputs, weighed in every one of `kinds`, in one pass."""

    def __init__(self, kinds: Collection[str] = tuple(APART)) -> None:
        self._kinds = kinds
        self.sums: dict[Key, Tensor] = {}
        self.counts: dict[tuple[str, int], Tensor] = {}
        self._layers: dict[int, dict[str, Tensor]] = {}

    def inputs(self, layer: int, x: Tensor, routed: Tensor, hidden: Tensor) -> None:
        self._layers[layer] = {"x": x.detach(), "routed": routed.detach(), "hidden": hidden}

    def outputs(self, layer: int, inner: Tensor, out: Tensor) -> None:
        self._layers[layer] |= {"inner": inner.detach(), "out": out}

    def add(self, part: str, log_p: Tensor, generator: torch.Generator) -> None:
        """After a forward pass: the gradients of labels drawn from the model, and the sums."""
        flat = log_p.detach().exp().flatten(0, 1)
        labels = torch.multinomial(flat, 1, generator=generator).view(*log_p.shape[:2], 1)
        layers = list(self._layers)
        wanted = [self._layers[n][k] for k in ("hidden", "out") for n in layers]
        found = torch.autograd.grad(-log_p.gather(-1, labels).sum(), wanted)
        for i, layer in enumerate(layers):
            self._add_layer(part, layer, found[i], found[i + len(layers)])
        self._layers.clear()

    @torch.no_grad()
    def _add_layer(self, part: str, layer: int, d_hidden: Tensor, d_out: Tensor) -> None:
        of = self._layers[layer]
        x, inner, routed = of["x"], of["inner"], of["routed"].t()  # routed [E, T]
        squares = d_hidden.square().unflatten(-1, (GROUPS, -1)).mean(-1)  # [E, T, groups]
        halves = squares.unflatten(-1, (2, -1)).mean(-1)
        mean = squares.mean(-1, keepdim=True)
        up = {
            "router": routed.square()[..., None],
            "gradient": mean,
            "halves": halves,
            "groups": squares,
            "root": mean.sqrt() * routed[..., None],
        }
        back = routed.square() * d_out.square().mean(-1)
        down = {"router": routed.square(), "gradient": back, "root": back.sqrt() * routed}
        for weights in (w for w in up if w in self._kinds):
            s = up[weights]
            for group in range(s.shape[-1]):
                sums = torch.stack([(x * w[:, group, None]).t() @ x for w in s])
                self._sum((weights, part, layer, UP, group), sums)
        for weights in (w for w in down if w in self._kinds):
            s = down[weights]
            sums = (inner * s[..., None]).transpose(1, 2) @ inner
            self._sum((weights, part, layer, DOWN, 0), sums)
        counts = (routed > 0).sum(1).double()
        self.counts[part, layer] = self.counts.get((part, layer), 0) + counts

    def _sum(self, key: Key, value: Tensor) -> None:
        known = self.sums.get(key)
        self.sums[key] = value.double() if known is None else known + value.double()

    def of(self, choice: Choice, layer: int, projection: str, group: int) -> np.ndarray:
        """Means [E, K, K] with the product's shrinkage."""
        weights = choice.weights
        if projection == DOWN and weights in ("halves", "groups"):
            weights = "gradient"
        own = sum(self.sums[weights, part, layer, projection, group] for part in choice.parts)
        counts = sum(self.counts[part, layer] for part in choice.parts)
        pooled = own.sum(0) * (SHRINKAGE / counts.sum())
        return ((own + pooled) / (counts + SHRINKAGE)[:, None, None]).cpu().numpy()


class Lab:
    """A model, its statistics, and codes by every choice asked for so far."""

    def __init__(self, model: Path, texts: dict[str, np.ndarray]) -> None:
        source = open_checkpoint(model)
        self.device_name = torch.cuda.get_device_name()
        self.net = Ernie(source.config, "cuda")
        self.float = self.net.load(source)
        self.rounded = in_wint8(self.net, self.float)
        self.texts = {name: torch.from_numpy(w).cuda() for name, w in texts.items()}
        self.coded: dict[str, Coded] = {}
        self._lock = threading.Lock()
        self._books: dict[int, np.ndarray] = {}
        size = source.config.hidden_size
        normal = np.random.default_rng(0).standard_normal((size, size))
        self._turn = np.linalg.qr(normal)[0]
        self.hessians = Hessians()
        generator = torch.Generator(device="cuda").manual_seed(0)
        # One weight needs a gradient: without any, PyTorch records no backward pass.
        weights = dict(self.float)
        name = "ernie.embed_tokens.weight"
        weights[name] = weights[name].clone().requires_grad_()
        for part in ("a", "b", "m"):
            windows = self.texts[part]
            for first in range(0, len(windows), AT_ONCE):
                log_p = self.net(weights, windows[first : first + AT_ONCE], self.hessians)
                self.hessians.add(part, log_p, generator)

    def measured(self, weights: Weights) -> dict[str, np.ndarray]:
        return compare(self.net, weights, self.float, self.texts["held out"])

    def encoded(self, label: str, choice: Choice) -> dict[str, np.ndarray]:
        """Encode all experts by a choice, keep them under `label`, and measure them."""
        coded = Coded(dict(self.rounded))
        jobs = {}
        with ThreadPoolExecutor(12) as pool:
            for layer in self.net.config.moe_layers():
                for projection in (UP, DOWN):
                    encode = self._matrix(choice, layer, projection)
                    experts = range(self.net.config.moe_num_experts)
                    key = expert_key(layer, projection)
                    jobs[key] = [pool.submit(encode, e) for e in experts]
            for key, waiting in jobs.items():
                done = [job.result() for job in waiting]
                weights, supers, scales, vectors = (
                    torch.from_numpy(np.stack(p)).cuda() for p in zip(*done, strict=True)
                )
                coded.weights[key], coded.supers[key] = weights, supers
                coded.scales[key], coded.books[key] = scales, vectors
        self.coded[label] = coded
        return self.measured(coded.weights)

    def tuned(self, label: str, way: Way) -> dict[str, np.ndarray]:
        """Tune the codes of a label and measure them."""
        learned = torch.cat([self.texts["a"], self.texts["b"]])
        count = min(way.windows, len(learned))
        some = torch.linspace(0, len(learned) - 1, count).round().long().cuda()
        windows = torch.cat([learned[some], self.texts["m"]])
        return self.measured(tune(self.net, self.float, self.coded[label], windows, way))

    def _matrix(self, choice: Choice, layer: int, projection: str):
        """What encodes one expert's matrix: expert -> decoded [K, N], supers, scales, books."""
        recipe = LDLQ_RECIPES[choice.preset]
        weights = self.float[expert_key(layer, projection)].cpu().numpy().astype(np.float64)
        groups = APART[choice.weights] if projection == UP else 1
        hessians = [self.hessians.of(choice, layer, projection, g) for g in range(groups)]
        size = weights.shape[1]
        # Inputs are multiplied by `back` and weights by `there`, which leaves the product as it is.
        there = back = np.eye(size)
        after = np.eye(weights.shape[2])
        if choice.rotated and projection == UP:
            gain = self.float[LAYER.format(layer) + "post_attention_layernorm.weight"]
            gain = gain.cpu().numpy().astype(np.float64)
            there, back = self._turn * gain, self._turn.T / gain[:, None]
        if choice.rotated and projection == DOWN:
            after = self._turn
        # The norm is shared by all experts; a down projection's inputs are its own.
        sizes = np.log(np.square(weights).mean(2)) / 2  # [E, K]
        if projection == UP and "up" in choice.even:
            sizes = np.broadcast_to(sizes.mean(0), sizes.shape)

        def encode(expert: int) -> tuple[np.ndarray, ...]:
            to, fro = there, back
            if projection in (DOWN, UP) and projection.split("_")[0] in choice.even:
                scale = np.exp(sizes[expert].mean() - sizes[expert])
                to, fro = np.diag(scale), np.diag(1 / scale)
            turned = to @ weights[expert] @ after.T
            width = turned.shape[1] // groups
            parts = []
            for group in range(groups):
                h = fro.T @ hessians[group][expert] @ fro
                columns = turned[:, group * width : (group + 1) * width]
                parts.append(self._search(columns, h, recipe, choice.damping))
            decoded = fro @ np.concatenate([p[0] for p in parts], 1) @ after
            return decoded.astype(np.float32), *(
                np.concatenate([p[i] for p in parts]) for i in (1, 2, 3)
            )

        return encode

    def _search(
        self, weight: np.ndarray, h: np.ndarray, recipe: LdlqRecipe, damping: float
    ) -> tuple[np.ndarray, ...]:
        """The product's search on the GPU, and what its decoder makes of the result."""
        metric = make_metric(h, damping).as_dict()
        prepared = prepare(np.ascontiguousarray(weight.T, np.float32), recipe)
        with self._lock:  # the library serves one caller at a time
            if recipe.code_pairs not in self._books:
                self._books[recipe.code_pairs] = books(recipe.code_pairs)
            known = self._books[recipe.code_pairs]
            found, _ = ldlq(prepared.weight, metric, known, prepared.supers, recipe.as_dict())
        vectors = known[found["pairs"]]  # [N, 4, 256]
        words = found["words"].astype(np.int64)[:, :, None]
        states = np.take_along_axis(vectors.transpose(0, 2, 1), words, axis=1).reshape(
            len(words), -1
        )
        scales = found["scales"].astype(np.float32)
        supers = np.ldexp(found["supers"], prepared.exponents).astype(np.float32)
        decoded = states * np.repeat(scales, 64, axis=1) * supers[:, None]
        return decoded.T, supers, scales, vectors
