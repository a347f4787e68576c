# SPDX-License-Identifier: Apache-2.0
"""The engine gives the evaluated model's tokens, alone and in any batch, and keeps its limits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from helpers.server import checkpoint, model, prompts, tokenizer
from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.models.weights import EXACT, weight_source
from paddle_ccq.serving.engine import (
    DrainingError,
    Engine,
    EngineSettings,
    Output,
    QueueFullError,
)
from paddle_ccq.serving.engine_model import EngineModel, Piece
from paddle_ccq.serving.kv_cache import KVCache
from paddle_ccq.serving.resources import resident_bytes
from paddle_ccq.serving.sampling import SamplingParams

NEW = 24
LARGE = os.environ.get("PADDLE_CCQ_LARGE_MODEL")  # a quantized checkpoint folder
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, ignore_eos=True)


class Collector:
    """Outputs of one request by choice."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[Output]] = {}
        self.left, self.done = 0, threading.Event()

    def __call__(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.index, []).append(output)
            if output.reason:
                self.left -= 1
        if not self.left:
            self.done.set()

    def tokens(self, index: int = 0) -> list[int]:
        return [output.logprob.token for output in self.outputs[index]]


def new_engine(model: EngineModel, *settings: int) -> Engine:
    engine = Engine(model, tokenizer().decode, frozenset(), EngineSettings(*settings))
    engine.start()
    return engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = new_engine(model(), 8, 4096, 64)
    yield engine
    engine.stop()


def submit(engine: Engine, given: list[list[int]], params: SamplingParams, n: int = 1) -> Collector:
    collector = Collector()
    collector.left = len(given) * n
    collector.request = engine.submit(given, params, collector, n)
    return collector


def test_logits_are_the_float_models() -> None:
    paddle = pytest.importorskip("paddle")
    from paddle_ccq.models.ernie import Ernie

    reference = Ernie(weight_source(checkpoint(), EXACT))
    for tokens in prompts(2):
        cache = model().new_cache(512)
        cut = len(tokens) // 2
        region = cache.allocate(len(tokens))
        model().forward([Piece(tokens[:cut], 0, region, wants_logits=False)], cache)
        found = model().forward([Piece(tokens[cut:], cut, region)], cache)[0]
        hidden = reference.hidden_states(paddle.to_tensor([tokens]))
        wanted = reference.logits(hidden[:, -1]).numpy()[0]
        # Float32 in two orders of summation: measured 8e-7.
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def check_greedy(checkpoint: Checkpoint, model: EngineModel, given: list[list[int]]) -> None:
    """evaluate's model gives the same tokens, alone and in batches of different makeup."""
    pytest.importorskip("paddle")
    from paddle_ccq.models.ernie import Ernie
    from paddle_ccq.models.generation import generate

    wanted = generate(Ernie(weight_source(checkpoint, EXACT)), given, NEW)
    for settings, order in (((16, 8192, 512), 1), ((5, 4096, 40), -1), ((1, 2048, 512), 1)):
        engine = new_engine(model, *settings)
        asked = [submit(engine, [prompt], GREEDY) for prompt in given[::order]]
        assert all(one.done.wait(120) for one in asked)
        engine.stop()
        assert [one.tokens() for one in asked[::order]] == wanted


def test_greedy_tokens_are_evaluates_alone_and_in_any_batch() -> None:
    check_greedy(checkpoint(), model(), prompts(12))


@pytest.mark.skipif(not LARGE, reason="PADDLE_CCQ_LARGE_MODEL names no checkpoint")
def test_greedy_tokens_of_a_larger_model() -> None:
    large = open_checkpoint(LARGE)
    check_greedy(large, EngineModel(large), prompts(25))


def test_logits_are_the_same_bits_in_any_batch_and_however_a_prompt_is_cut() -> None:
    given = prompts(3)

    def logits(cuts: list[list[list[int]]]) -> np.ndarray:
        """The last logits of each prompt; cuts[step] is tokens of each prompt in that step."""
        cache = model().new_cache(4096)
        regions = [cache.allocate(len(prompt)) for prompt in given]
        done, last = [0] * len(given), [None] * len(given)
        for step in cuts:
            wanted = [s for s, tokens in enumerate(step) if tokens]
            pieces = [Piece(step[s], done[s], regions[s]) for s in wanted]
            for s, row in zip(wanted, model().forward(pieces, cache), strict=True):
                last[s] = row
                done[s] += len(step[s])
        assert done == [len(prompt) for prompt in given]
        return np.array(last)

    together = logits([given])
    alone = logits([[p if s == one else [] for s, p in enumerate(given)] for one in range(12)])
    assert np.array_equal(alone, together)
    longest = max(map(len, given))
    pieces = logits([[p[at : at + 5] for p in given] for at in range(0, longest, 5)])
    assert np.array_equal(pieces, together)


def test_a_seed_gives_the_same_tokens_in_any_batch(engine: Engine) -> None:
    given = prompts(2)
    params = SamplingParams(NEW, temperature=0.9, top_p=0.95, seed=7, logprobs=0, ignore_eos=True)
    together = submit(engine, given, params)
    assert together.done.wait(20)
    first = submit(engine, given[:1], params, n=3)
    assert first.done.wait(20)
    assert first.tokens(0) == together.tokens(0)
    assert len({tuple(first.tokens(i)) for i in range(3)}) == 3  # choices differ


def test_an_answer_has_at_least_min_tokens(engine: Engine) -> None:
    free = submit(engine, prompts(1), GREEDY)
    assert free.done.wait(20)
    for index in range(4):
        tokens = free.tokens(index)
        prompt = prompts(1)[index]
        first, third = tokens[0], tokens[2]
        text = tokenizer().decode(tokens)
        ends = SamplingParams(
            NEW, temperature=0, logprobs=0, stop_token_ids=(first,), stop=(text[0],)
        )
        ended = submit(engine, [prompt], ends)
        assert ended.done.wait(20)
        [output] = ended.outputs[0]
        assert (output.reason, output.text) == ("stop", "")
        for least in (1, 5, NEW):
            params = replace(ends, min_tokens=least)
            long = submit(engine, [prompt], params)
            assert long.done.wait(20)
            found = long.tokens()
            assert len(found) >= least and first not in found[:least]
            reason = long.outputs[0][-1].reason
            assert reason == ("length" if len(found) == NEW and found[-1] != first else "stop")
        # A token of its own ends the text before itself, whatever `ignore_eos` says.
        params = replace(GREEDY, stop_token_ids=(third,))
        ended = submit(engine, [prompt], params)
        assert ended.done.wait(20)
        assert ended.tokens() == tokens[: tokens.index(third) + 1]
        said = "".join(output.text for output in ended.outputs[0])
        assert said == tokenizer().decode(tokens[: tokens.index(third)])
        assert ended.outputs[0][-1].reason == "stop"


def test_a_prompt_is_scored_the_same_in_any_batch_and_without_an_answer() -> None:
    given = prompts(2)
    found = []
    for settings in ((8, 4096, 512), (3, 4096, 7), (1, 4096, 64)):
        engine = new_engine(model(), *settings)
        for most in (0, 1, NEW):
            params = replace(GREEDY, prompt_logprobs=2, max_tokens=most)
            # Twice, so that some are copied.
            asked = submit(engine, [*given, *given[:3]], params)
            assert asked.done.wait(20)
            scores = [asked.outputs[i][0].prompt for i in range(len(given) + 3)]
            assert scores[len(given) :] == scores[:3]
            assert [len(s) for s in scores[: len(given)]] == [len(p) - 1 for p in given]
            assert all(o.prompt is None for outputs in asked.outputs.values() for o in outputs[1:])
            assert most or all(o[0].tokens == 0 for o in asked.outputs.values())
            found.append(scores)
        engine.stop()
        assert engine.cache.used == 0
    assert all(scores == found[0] for scores in found)


def test_scores_that_are_not_finite_end_their_request_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = EngineModel._logits

    def broken(self: EngineModel, x: np.ndarray) -> np.ndarray:
        found = logits(self, x)
        return np.where(np.arange(len(found))[:, None] == 3, np.nan, found)

    with monkeypatch.context() as patch:
        patch.setattr(EngineModel, "_logits", broken)
        asked = submit(engine, prompts(1)[:1], replace(GREEDY, prompt_logprobs=1))
        assert asked.done.wait(10)
    assert asked.outputs[0][-1].reason == "error"
    fine = submit(engine, prompts(1)[:1], GREEDY)
    assert fine.done.wait(10) and fine.outputs[0][-1].reason == "length"


def test_equal_prompts_of_a_request_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    forward = EngineModel.forward

    def counting(self: EngineModel, pieces: list[Piece], cache: KVCache) -> np.ndarray:
        nonlocal computed
        computed += sum(len(piece.tokens) for piece in pieces)
        return forward(self, pieces, cache)

    monkeypatch.setattr(EngineModel, "forward", counting)
    prompt, other = max(prompts(5), key=len), min(prompts(5), key=len)
    params = SamplingParams(NEW, temperature=1, seed=3, logprobs=0, ignore_eos=True)
    for settings in ((8, 4096, 16), (8, 4096, 512), (2, 4096, 512)):
        engine = new_engine(model(), *settings)
        alone = [submit(engine, [p], params, 2) for p in (prompt, other)]
        assert all(one.done.wait(20) for one in alone)
        computed = 0
        # The choices 0 and 1 of prompt 0 have the indices 0 and 1, as alone; 4 and 5 are new.
        shared = submit(engine, [prompt, other, prompt], params, 2)
        assert shared.done.wait(20)
        engine.stop()
        assert [shared.tokens(i) for i in (0, 1)] == [alone[0].tokens(i) for i in (0, 1)]
        assert len({tuple(shared.tokens(i)) for i in range(6)}) == 6
        if settings[0] == 8:
            # All prompts but the last token, once; that one and the answers for each choice.
            assert computed == len(prompt) + len(other) - 2 + 6 * NEW
        assert engine.cache.used == 0


def test_more_than_fits_at_once_is_served_in_order() -> None:
    finished: list[int] = []
    engine = Engine(model(), tokenizer().decode, frozenset(), EngineSettings(2, 256, 32))
    engine.start()
    given = prompts(3)
    done = threading.Event()

    def deliver(outputs: list[Output]) -> None:
        finished.extend(o.index for o in outputs if o.reason)
        if len(finished) == len(given):
            done.set()

    engine.submit(given, SamplingParams(4, temperature=0, ignore_eos=True), deliver)
    assert done.wait(20)
    engine.stop()
    # Two run at a time and generate alike, so no request can finish before its predecessor's.
    assert all(abs(place - index) <= 1 for place, index in enumerate(finished))
    assert engine.counts() == (0, 0, 0.0)


def test_cancel_frees_the_slot_and_delivers_no_more(engine: Engine) -> None:
    long = SamplingParams(1500, temperature=0, ignore_eos=True)
    collector = submit(engine, prompts(1)[:1] * 2, long)
    while not collector.outputs:
        time.sleep(0.001)
    engine.cancel(collector.request)
    after = submit(engine, prompts(1)[:1], SamplingParams(2, ignore_eos=True))
    assert after.done.wait(10)
    assert not collector.done.is_set()
    assert engine.idle and engine.cache.used == 0


def test_a_full_queue_and_a_draining_engine_refuse() -> None:
    engine = Engine(model(), tokenizer().decode, frozenset(), EngineSettings(1, 512, 64, 3))
    collector = submit(engine, prompts(1)[:3], GREEDY)  # not started: they stay in the queue
    with pytest.raises(QueueFullError):
        submit(engine, prompts(1)[:1], GREEDY)
    engine.drain()
    with pytest.raises(DrainingError):
        submit(engine, prompts(1)[:1], GREEDY)
    engine.start()
    assert collector.done.wait(20)  # what was queued is served
    engine.stop()


def test_what_can_never_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="tokens"):
        submit(engine, [[1] * 2030], GREEDY)
    with pytest.raises(ValueError, match="tokens"):
        submit(engine, [[]], GREEDY)


def test_a_failing_step_ends_its_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model(), "layers", [None])
        failed = submit(engine, prompts(1)[:1], GREEDY)
        assert failed.done.wait(10)
    assert failed.outputs[0][-1].reason == "error"
    fine = submit(engine, prompts(1)[:1], GREEDY)
    assert fine.done.wait(10)
    assert fine.outputs[0][-1].reason == "length"


def test_the_cache_joins_what_is_released() -> None:
    cache = KVCache(1, 1, 2, 30 * 16)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            cache.release(held.pop(int(rng.integers(len(held)))))
        elif (region := cache.allocate(int(rng.integers(1, 150)))) is not None:
            held.append(region)
        places = [p for r in held for p in range(r.start, r.start + r.length)]
        assert len(places) == len(set(places)) == cache.used
        assert all(r.start % 16 == 0 for r in held)
    for region in held:
        cache.release(region)
    assert cache.allocate(480) is not None
    assert cache.allocate(1) is None


def test_the_cache_takes_memory_only_where_it_is_written() -> None:
    before = resident_bytes()
    cache = KVCache(layers=8, kv_heads=4, head_dim=64, tokens=20_000)
    cache.keys[:, :, :1] = 1
    cache.values[:, :, :16] = 1
    assert cache.nbytes > 300 << 20
    assert resident_bytes() - before < 8 << 20
