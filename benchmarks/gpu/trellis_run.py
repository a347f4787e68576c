# SPDX-License-Identifier: Apache-2.0
"""The work behind trellis.py: ccq-2t by the product's search, by relaxation, and EXL3's codes."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from choices_list import Way
from choices_run import DOWN, UP, Hessians
from choices_tune import Coded, tune
from torch import Tensor
from torch_ernie import Ernie, Weights, compare, expert_key, in_wint8, swiglu
from trellis_codes import Codes, Soft, candidates

from paddle_ccq.encoder.ldlq import prepare, unscaled
from paddle_ccq.encoder.trellis_ldlq import TRELLIS_LDLQ_RECIPES, TrellisLdlqRecipe
from paddle_ccq.encoder.trellis_metric import make_trellis_metric
from paddle_ccq.ops.gpu_trellis_ldlq import trellis_ldlq

AT_ONCE = 8
THREADS = 14
Layers = dict[str, Codes]


@dataclass(frozen=True)
class Choice:
    """One way to choose codes: `parts` of the text and `weights` as in choices_list.Choice."""

    parts: str = "ab"
    weights: str = "gradient"
    recipe: TrellisLdlqRecipe = TRELLIS_LDLQ_RECIPES["default"]


@dataclass(frozen=True)
class Relaxation:
    """One way to move codes by gradients of a layer's output.

    Attributes:
        count: candidates of a segment; 1: codes stay, super scales alone are moved.
        phases: a round for each, with segments of `moved` + 1 bytes from there on.
        steps, tokens: of descent, and tokens of each.
        rate, scale_rate: Adam's, of logits and of logarithms of super scales.
        warm, cold: temperature of the first and the last step.
        sharpness: logits at the start are -sharpness times what a change costs (Candidates.rise).
        weights: of tokens: "router", all alike at the layer's output, or "gradient".
    """

    count: int = 8
    moved: int = 2
    phases: tuple[int, ...] = (0,)
    steps: int = 200
    tokens: int = 8192
    rate: float = 0.03
    scale_rate: float = 1e-3
    warm: float = 1.0
    cold: float = 0.03
    sharpness: float = 1.0
    weights: str = "gradient"


class Kept(Hessians):
    """Hessians, and every MoE layer's inputs and token weights, kept on the GPU."""

    def __init__(self) -> None:
        super().__init__(("router", "gradient"))
        self._inputs: dict[int, list[tuple[Tensor, ...]]] = {}

    @torch.no_grad()
    def _add_layer(self, part: str, layer: int, d_hidden: Tensor, d_out: Tensor) -> None:
        super()._add_layer(part, layer, d_hidden, d_out)
        of = self._layers[layer]
        kept = of["x"].clone(), of["routed"].clone(), d_out.square().mean(-1)
        self._inputs.setdefault(layer, []).append(kept)

    def inputs_of(self, layer: int) -> tuple[Tensor, ...]:
        """x [T, H], routing weights [T, E], squared gradients at the layer's output [T]."""
        return tuple(torch.cat(p) for p in zip(*self._inputs[layer], strict=True))


class TrellisLab:
    """A model, its statistics, and codes by every choice asked for so far."""

    def __init__(self, source: object, texts: dict[str, np.ndarray]) -> None:
        self.device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = Ernie(source.config, device)
        self.float = self.net.load(source)
        self.rounded = in_wint8(self.net, self.float)
        self.texts = {name: torch.from_numpy(w).to(device) for name, w in texts.items()}
        self.codes: dict[str, Layers] = {}
        self._lock = threading.Lock()
        self.hessians = Kept()
        generator = torch.Generator(device=device).manual_seed(0)
        weights = dict(self.float)
        name = "ernie.embed_tokens.weight"
        weights[name] = weights[name].clone().requires_grad_()
        for part in (p for p in ("a", "b", "m") if p in self.texts):
            for windows in self.texts[part].split(AT_ONCE):
                log_p = self.net(weights, windows, self.hessians)
                self.hessians.add(part, log_p, generator)

    def keys(self) -> list[tuple[int, str, str]]:
        """(layer, projection, key) of all experts."""
        layers = self.net.config.moe_layers()
        return [(n, p, expert_key(n, p)) for n in layers for p in (UP, DOWN)]

    def measured(self, weights: Weights, text: str = "held out") -> dict[str, np.ndarray]:
        return compare(self.net, weights, self.float, self.texts[text])

    def with_codes(self, codes: Layers) -> Weights:
        return self.rounded | {key: of.decoded() for key, of in codes.items()}

    def hessian(self, choice: Choice, layer: int, projection: str) -> np.ndarray:
        return self.hessians.of(choice, layer, projection, 0)

    def encoded(self, choice: Choice) -> Layers:
        """Codes of all experts by the product's calibrated search."""
        jobs = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for layer, projection, key in self.keys():
                weights = self.float[key].cpu().numpy()
                hessians = self.hessian(choice, layer, projection)
                jobs[key] = [
                    pool.submit(self._search, w, h, choice.recipe)
                    for w, h in zip(weights, hessians, strict=True)
                ]
            return {key: self._stacked([j.result() for j in found]) for key, found in jobs.items()}

    def _stacked(self, found: list[dict[str, np.ndarray]]) -> Codes:
        def stack(name: str) -> Tensor:
            return torch.from_numpy(np.stack([f[name] for f in found])).to(self.net.device)

        supers = stack("supers").float()
        return Codes(stack("words").flatten(2), stack("scales").float(), supers)

    def _search(self, w: np.ndarray, h: np.ndarray, recipe: TrellisLdlqRecipe) -> dict:
        metric = make_trellis_metric(h, recipe.damping).as_dict()
        prepared = prepare(np.ascontiguousarray(w.T, np.float32), recipe)
        arguments = prepared.weight, metric, prepared.supers, recipe.as_dict()
        with self._lock:  # the library serves one caller at a time
            found, _ = trellis_ldlq(*arguments)
        return unscaled(found, prepared)

    def proxy(self, choice: Choice, weights: Weights) -> dict[str, float]:
        """Mean over matrices of e H e^T / w H w^T, by projection."""
        found: dict[str, list[float]] = {UP: [], DOWN: []}
        for layer, projection, key in self.keys():
            hessians = torch.from_numpy(self.hessian(choice, layer, projection))
            for h, w, decoded in zip(hessians, self.float[key], weights[key], strict=True):
                h, w, decoded = (t.to(self.net.device).double() for t in (h, w, decoded))
                e = w - decoded
                found[projection].append(float(((h @ e) * e).sum() / ((h @ w) * w).sum()))
        return {projection: float(np.mean(values)) for projection, values in found.items()}

    @torch.no_grad()
    def gain_in_down(self, codes: Layers, weights: str) -> Layers:
        """Super scales of down multiplied by what fits each expert's outputs best, by columns."""
        changed = dict(codes)
        for layer in self.net.config.moe_layers():
            x, routed, sensitivity = self.hessians.inputs_of(layer)
            up, down = (expert_key(layer, p) for p in (UP, DOWN))
            ours = [codes[key].decoded() for key in (up, down)]
            cross, norm = 0.0, 0.0
            for t in torch.arange(len(x), device=x.device).split(16384):
                wanted = swiglu(x[t] @ self.float[up]) @ self.float[down]  # [E, T, H]
                found = swiglu(x[t] @ ours[0]) @ ours[1]
                weight = routed[t].t().square()
                if weights == "gradient":
                    weight = weight * sensitivity[t]
                cross = cross + (weight[..., None] * found * wanted).sum(1).double()
                norm = norm + (weight[..., None] * found.square()).sum(1).double()
            factor = torch.where(norm > 0, cross / norm, 1.0).float()
            supers = (codes[down].supers * factor).bfloat16().float()
            changed[down] = dataclasses.replace(codes[down], supers=supers)
        return changed

    def relaxed(self, codes: Layers, way: Relaxation) -> Layers:
        """Codes, and super scales, moved by gradients of the outputs layer by layer."""
        changed = dict(codes)
        for layer in self.net.config.moe_layers():
            for phase in way.phases if way.count > 1 else (0,):
                changed |= self._relaxed_layer(layer, changed, way, phase)
        return changed

    def _relaxed_layer(self, layer: int, codes: Layers, way: Relaxation, phase: int) -> Layers:
        x, routed, sensitivity = self.hessians.inputs_of(layer)
        if way.weights == "router":
            sensitivity = torch.ones_like(sensitivity)
        sensitivity = sensitivity / sensitivity.mean()
        keys = [expert_key(layer, p) for p in (UP, DOWN)]
        exact = [self.float[key] for key in keys]
        soft, logits, factors = [], [], []
        for projection, key, weight in zip((UP, DOWN), keys, exact, strict=True):
            hessian = torch.from_numpy(
                self.hessian(Choice(weights=way.weights), layer, projection)
            ).to(weight.device)
            found = candidates(codes[key], weight, hessian.float(), way.count, way.moved, phase)
            soft.append(Soft(codes[key], found))
            start = (-way.sharpness * found.rise).clamp(-20, 20)
            logits.append(start.clone().requires_grad_())
            factors.append(torch.zeros_like(codes[key].supers).requires_grad_())

        def output(weights: list[Tensor], t: Tensor) -> Tensor:
            inner = swiglu(x[t] @ weights[0]) * routed[t].t()[..., None]
            return inner.transpose(0, 1).flatten(1) @ weights[1].flatten(0, 1)

        def loss(weights: list[Tensor], t: Tensor) -> Tensor:
            error = output(weights, t) - output(exact, t)
            return (sensitivity[t] * error.square().sum(-1)).mean()

        def steps(i: int, rounded: bool) -> Tensor:
            supers = soft[i].codes.supers * factors[i].exp()
            if rounded:
                supers = supers.detach().bfloat16().float()
            return dataclasses.replace(soft[i].codes, supers=supers).steps()

        @torch.no_grad()
        def now() -> tuple[float, Layers]:
            found = {}
            for i, key in enumerate(keys):
                supers = (soft[i].codes.supers * factors[i].exp()).bfloat16().float()
                found[key] = dataclasses.replace(soft[i].hard(logits[i]), supers=supers)
            some = torch.arange(0, len(x), max(1, len(x) // 65536), device=x.device)
            parts = [loss([found[k].decoded() for k in keys], t) for t in some.split(8192)]
            return float(torch.stack(parts).mean()), found

        moved = [*logits, *factors] if way.count > 1 else factors
        groups = [{"params": factors, "lr": way.scale_rate}]
        if way.count > 1:
            groups.append({"params": logits, "lr": way.rate})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        started, _ = now()
        generator = torch.Generator(device=x.device).manual_seed(layer)
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        for step in range(way.steps):
            share = step / max(1, way.steps - 1)
            temperature = way.warm * (way.cold / way.warm) ** share
            for group, rate in zip(
                optimizer.param_groups, (way.scale_rate, way.rate), strict=False
            ):
                group["lr"] = rate * min(1.0, (step + 1) / 20, 2 * (1 - share) + 0.02)
            t = torch.randint(len(x), (way.tokens,), device=x.device, generator=generator)
            weights = [
                s(of / temperature, steps(i, False))
                for i, (s, of) in enumerate(zip(soft, logits, strict=True))
            ]
            value = loss(weights, t)
            for p in moved:
                p.grad = None
            value.backward()
            optimizer.step()
        torch.backends.cuda.matmul.allow_tf32 = allowed
        ended, found = now()
        share = [
            float((found[k].words != codes[k].words).float().mean()) if way.count > 1 else 0.0
            for k in keys
        ]
        print(
            f"   layer {layer}: {started:.4g} -> {ended:.4g} ({ended / started - 1:+.1%}); bytes"
            f" changed {share[0]:.1%}, {share[1]:.1%}",
            flush=True,
        )
        return found if ended < started else {k: codes[k] for k in keys}

    def tuned(self, codes: Layers, way: Way, made: bool = False) -> Weights:
        """The model of some codes, tuned as choices_tune.tune does; `made`: on made-up text too."""
        coded = Coded(self.with_codes(codes))
        for key, of in codes.items():
            coded.supers[key], coded.scales[key] = of.supers, of.scales
        learned = torch.cat([self.texts["a"], self.texts["b"]])
        count = min(way.windows, len(learned))
        some = torch.linspace(0, len(learned) - 1, count).round().long().to(learned.device)
        windows = torch.cat([learned[some], self.texts["m"]]) if made else learned[some]
        return tune(self.net, self.float, coded, windows, way)

    def exl3(self, choice: Choice, **options: bool) -> Weights:
        """All experts as EXL3's quantizer (exllamav3) returns them at 2 bits."""
        from exllamav3.modules.quant.exl3_lib.quantize import quantize_exl3

        weights = dict(self.rounded)
        for layer, projection, key in self.keys():
            hessians = self.hessian(choice, layer, projection)
            found = []
            for expert, (w, h) in enumerate(zip(self.float[key], hessians, strict=True)):
                k = len(h)
                data = {
                    "H": torch.from_numpy(h).float().to(w.device), "count": 1, "finalized": False,
                    "L": None, "device": w.device, "packed": False, "n": k, "num_total": 1,
                    "first_key": f"{key} {expert}", "inf_nan": None,
                }  # fmt: skip
                arguments = {
                    "K": 2, "seed": 1, "devices": ["cuda:0"], "device_ratios": None,
                    "apply_out_scales": None, "debug_dir": "/tmp", "no_pack": True,
                }  # fmt: skip
                decoded = quantize_exl3(w.contiguous().clone(), data, arguments | options, True)[0]
                found.append(decoded.float())
            weights[key] = torch.stack(found)
        return weights
