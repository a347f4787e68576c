# SPDX-License-Identifier: Apache-2.0
"""Ask a server one question through the openai package, streamed or not."""

from __future__ import annotations

import argparse
import os
import sys

import openai


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8180/v1")
    parser.add_argument("--model", help="(the first that the server names)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    args = parser.parse_args()

    key = os.environ.get("FD_API_KEY", "none").split(",")[0]
    client = openai.OpenAI(base_url=args.url, api_key=key)
    try:
        model = args.model or client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.question}],
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            stream=args.stream,
        )
        if args.stream:
            for chunk in answer:
                if chunk.choices and chunk.choices[0].delta.content:
                    print(chunk.choices[0].delta.content, end="", flush=True)
            print()
        else:
            print(answer.choices[0].message.content)
    except openai.OpenAIError as error:
        print(f"error: {args.url}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
