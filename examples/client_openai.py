# SPDX-License-Identifier: Apache-2.0
"""Ask a running server through the openai package: whole, streamed, and several at once.

python -m paddle_ccq.serve DIR &
python examples/client_openai.py
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import openai

from paddle_ccq.errors import run_cli

PROMPT = "Q: 585 - 17 = ?\nA:"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    key = os.environ.get("PADDLE_CCQ_API_KEY", "none")

    client = openai.OpenAI(base_url=args.base_url, api_key=key)
    model = client.models.list().data[0].id
    whole = client.completions.create(
        model=model, prompt=args.prompt, max_tokens=args.max_tokens, temperature=0, stop="\n"
    )
    print(f"{model}: {args.prompt}{whole.choices[0].text}")
    print(f"finished by {whole.choices[0].finish_reason}, {whole.usage.total_tokens} tokens\n")

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_completion_tokens=args.max_tokens,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n({chunk.usage.completion_tokens} tokens streamed)\n")

    answers = asyncio.run(at_once(args.base_url, key, model))
    for question, answer in answers:
        print(f"{question!r} -> {answer!r}")
    return 0


async def at_once(base_url: str, key: str, model: str) -> list[tuple[str, str]]:
    """Concurrent requests share the server's steps; each gets what it would get alone."""
    questions = [f"Q: {n} + {n + 3} = ?\nA:" for n in range(10, 18)]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key) as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=model, prompt=question, max_tokens=8, temperature=0, stop="\n"
                )
                for question in questions
            )
        )
    return [(q, a.choices[0].text) for q, a in zip(questions, answers, strict=True)]


if __name__ == "__main__":
    sys.exit(run_cli(main))
