"""A stand-in for vLLM, as far as our own code calls it. It computes nothing of vLLM's.

Its engine batches, chunks, decodes and keeps a prefix cache, and says what it did. ``FAULT`` names what it does wrong.
"""

import random
from types import SimpleNamespace

FAULT = ""
VOCABULARY, BLOCK = 40, 32
loaded = []


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, *, worker_extension_cls, logits_processors, **options):
        loaded.append(SimpleNamespace(model=model, **options))
        if "not-a-model" in model:
            raise ValueError(f"{model} has no config.json")
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
        scheduler = _Scheduler(options["max_num_batched_tokens"])
        self.llm_engine = _Engine(scheduler, logits_processors[0]())

    def reset_prefix_cache(self):
        self.llm_engine.scheduler.blocks.clear()
        return FAULT != "keeps its cache"

    def collective_rpc(self, method):
        return [{"is_on": True, "fingerprint": "0123", "hits": 3}]


class _Request(SimpleNamespace):
    @property
    def known(self):
        return [*self.prompt, *self.generated]


class _Scheduler:
    """Prompts first come first served, bounded as vLLM 0.32 bounds them."""

    def __init__(self, tokens_of_a_step):
        self.scheduler_config = SimpleNamespace(long_prefill_token_threshold=0)
        self.max_num_scheduled_tokens = tokens_of_a_step
        self.requests, self.blocks = [], set()

    def get_request_counts(self):
        return len(self.requests), 0

    def schedule(self):
        chosen = self.requests[:1] if FAULT == "one at a time" else self.requests
        bound = self.scheduler_config.long_prefill_token_threshold if len(chosen) > 1 else self.max_num_scheduled_tokens
        if FAULT == "other chunks":
            bound = 5
        tokens = {}
        for request in chosen:
            left = len(request.known) - request.computed
            tokens[request.name] = min(left, bound) if bound else left
        return SimpleNamespace(num_scheduled_tokens=tokens, preempted_req_ids=None)


class _Engine:
    def __init__(self, scheduler, processor):
        self.scheduler, self._processor = scheduler, processor
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=BLOCK))

    def add_request(self, name, prompt, params):
        prompt = prompt["prompt_token_ids"]
        cached = 0
        while not params.skip_reading_prefix_cache and tuple(prompt[: cached + BLOCK]) in self.scheduler.blocks:
            cached += BLOCK
        cached = 0 if FAULT == "misses its cache" else cached
        force = self._processor.new_req_logits_processor(params)
        request = _Request(name=f"{name}-internal", id=name, prompt=prompt, params=params, generated=[], force=force)
        request.computed = request.cached = cached
        request.logprobs, request.of_prompt = [], [None, *(_logprobs(prompt[:i], prompt[i]) for i in range(1, len(prompt)))]
        self.scheduler.requests.append(request)
        return request.name

    def has_unfinished_requests(self):
        return bool(self.scheduler.requests)

    def abort_request(self, names, internal):
        self.scheduler.requests.clear()

    def step(self):
        output = self.scheduler.schedule()
        finished = []
        for request in list(self.scheduler.requests):
            request.computed += output.num_scheduled_tokens.get(request.name, 0)
            if request.computed < len(request.known):
                continue
            self._sample(request)
            if len(request.generated) == request.params.max_tokens:
                self.scheduler.requests.remove(request)
                full = range(BLOCK, len(request.prompt) + 1, BLOCK)
                self.scheduler.blocks.update(tuple(request.prompt[:end]) for end in full)
                finished.append(_answer(request))
        return finished[1:] if FAULT == "loses an answer" else finished

    def _sample(self, request):
        logits = _Logits(_weights(request.known))
        if request.force is not None and FAULT != "forgets what is forced":
            logits = request.force(request.generated, logits)
        token = max(range(VOCABULARY), key=logits.__getitem__)
        request.logprobs.append(_logprobs(request.known, token))
        request.generated.append(token)


class _Logits(list):
    def fill_(self, value):
        self[:] = [value] * len(self)


def _weights(tokens):
    draw = random.Random(f"{tokens}")
    return [-draw.random() for _ in range(VOCABULARY)]


def _logprobs(tokens, token):
    weights = _weights(tokens)
    ranked = sorted(range(VOCABULARY), key=weights.__getitem__, reverse=True)
    given = {token: ranked.index(token) + 1} | {other: rank for rank, other in enumerate(ranked[:8], 1)}
    if FAULT == "fewer logprobs":
        given.pop(ranked[7])
    nan = float("nan") if FAULT == "NaN" and len(tokens) == 3 else 0.0
    return {other: SimpleNamespace(rank=rank, logprob=weights[other] + nan) for other, rank in given.items()}


def _answer(request):
    logprobs = request.logprobs[1:] if FAULT == "logprobs of fewer tokens" else request.logprobs
    prompt = [0] if FAULT == "another prompt" else request.prompt
    return SimpleNamespace(
        request_id=request.id,
        finished=True,
        prompt_token_ids=prompt,
        prompt_logprobs=request.of_prompt,
        num_cached_tokens=1 if FAULT == "reads its cache unasked" else request.cached,
        outputs=[SimpleNamespace(token_ids=request.generated, logprobs=logprobs)],
    )
