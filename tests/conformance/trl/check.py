"""TRL: what `clients sample` writes is what its trainers read, and one step of training on it."""

from __future__ import annotations

import os
from pathlib import Path

from checks import KEY, OUT, URL, check, equal, main, run, true
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.data_utils import is_conversational, maybe_extract_prompt

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = AutoTokenizer.from_pretrained(os.environ["CONFORMANCE_TOKENIZER"])
PROMPTS = [f"Write a short review of a {thing}." for thing in ("hotel", "film", "tent", "bus")]
ENDINGS = ("jsonl", "parquet")
STEP = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no", "use_cpu": True}
STEP |= {"max_length": 128, "bf16": False, "gradient_checkpointing": False}


def sampled(ending: str) -> tuple[Dataset, Dataset]:
    """Samples and pairs, written by the command line and read by `datasets`."""
    files = [OUT / f"{name}.{ending}" for name in ("samples", "pairs")]
    prompts = OUT / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), "utf-8")
    command = ["python", "-m", "clients", "sample", "--prompts", prompts, "--url", URL, "--method", "bon"]
    command += ["--best-of", "2", "--keep", "2", "--max-tokens", "16", "--out", files[0], "--pairs", files[1]]
    done = run(*command, folder=ROOT, ENTRGI_API_KEY=KEY, PYTHONPATH=str(ROOT))
    equal(done.returncode, 0)
    kind = "json" if ending == "jsonl" else ending
    samples, pairs = (load_dataset(kind, data_files=str(file), split="train") for file in files)
    return samples, pairs


def model() -> Qwen3ForCausalLM:
    """A tiny one with fresh weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), num_key_value_heads=1, head_dim=16, **sizes))


@check
def formats() -> None:
    """sample: JSON lines and parquet are conversational prompt-completion and preference data"""
    for samples, pairs in map(sampled, ENDINGS):
        equal(len(samples), 2 * len(PROMPTS))
        true(all(is_conversational(row) for row in samples))
        true({"prompt", "completion"} <= set(samples.column_names), samples.column_names)
        true(len(pairs) > 0 and all(is_conversational(row) for row in pairs))
        equal(maybe_extract_prompt(pairs[0]), pairs[0])


@check
def sft() -> None:
    """SFTTrainer: one step on samples"""
    samples, _ = sampled("parquet")
    arguments = SFTConfig(output_dir=str(OUT / "sft"), **STEP)
    trainer = SFTTrainer(model(), args=arguments, train_dataset=samples, processing_class=TOKENIZER)
    true(trainer.train().training_loss > 0)


@check
def dpo() -> None:
    """DPOTrainer: one step on pairs"""
    _, pairs = sampled("jsonl")
    arguments = DPOConfig(output_dir=str(OUT / "dpo"), **STEP)
    trainer = DPOTrainer(model(), model(), args=arguments, train_dataset=pairs, processing_class=TOKENIZER)
    true(trainer.train().training_loss > 0)


if __name__ == "__main__":
    main("trl")
