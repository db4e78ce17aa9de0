"""The main job, end to end: load a foreign checkpoint through an installed plugin of 25 lines, and let it calculate."""

from __future__ import annotations

import time
from pathlib import Path

from infinilm import LLM
from infinilm.plugins.lineage import describe_lineage

MODEL = Path(__file__).parent / "model"
SUMS = {
    "seven plus eight is": "fifteen",
    "three minus nine is": "minus six",
    "twenty plus twenty-two is": "forty-two",
    "fifty-one minus thirty-four is": "seventeen",
    "ninety-nine plus ninety-nine is": "one hundred ninety-eight",
    "sixty-four minus sixty-four is": "zero",
}


def main() -> int:
    """Ask every sum, print what came back, who did what, and how long it took. Returns 1 for a wrong answer."""
    started = time.perf_counter()
    with LLM(MODEL) as llm:
        loaded = time.perf_counter()
        answers = llm.generate(list(SUMS))
        finished = time.perf_counter()
        for answer in answers:
            print(f"{answer.prompt}{answer.outputs[0].text}")
        num_tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        remapped = sorted({plugin for parameter in llm.plan.parameters for plugin in parameter.weight.trail})
        print()
        print(f"platform    {llm.platform.plugin}")
        print(f"checkpoint  {llm.checkpoint.plugin}")
        print(f"lineage     {describe_lineage(llm.lineage)}")
        print(f"weights     {len(llm.plan.parameters)} parameters, remapped by {', '.join(remapped)}")
        print(f"backend     {llm.choice.plugin}")
        print(f"processor   {llm.processor.plugin if llm.processor else 'none'}")
        print(f"time        {loaded - started:.2f} s to load, {finished - loaded:.2f} s for {num_tokens} tokens")
    wrong = [a.prompt for a, right in zip(answers, SUMS.values()) if a.outputs[0].text.strip() != right]
    print(f"answers     {len(answers) - len(wrong)} of {len(answers)} right")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
