"""TRL's DPO on an exported SFT model and our pairs, with our settings (those of dpo-2e-4, below):

    pip install trl                                          (measured with 1.16)
    python -m data.huggingface export exported/sft --stage sft
    python assets/peers/trl_dpo.py exported/sft out/cpu/reward_model/pairs.jsonl exported/trl-dpo
    python -m data.huggingface load exported/trl-dpo --stage dpo --name dpo-trl
    python dpo.py --name dpo-2e-4 --lr 2e-4
    python best_of_n.py --policies dpo-2e-4,dpo-trl

On several GPUs: accelerate launch assets/peers/trl_dpo.py ... (per_device_train_batch_size is the
batch of each).
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

start, pairs, out = sys.argv[1:]
GPU = torch.cuda.is_available()


def conversation(row):
    """A row of strings in TRL's conversational form, so that TRL applies the chat format."""
    return {"prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}]}


tokenizer = AutoTokenizer.from_pretrained(start)
policy = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
rows = load_dataset("json", data_files=pairs, split="train")

config = DPOConfig(
    out,
    beta=0.2,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    adam_beta2=0.95,
    num_train_epochs=1,
    per_device_train_batch_size=32,
    max_length=None,
    gradient_checkpointing=False,
    bf16=GPU,
    use_cpu=not GPU,
    seed=1,
    logging_steps=64,
    save_strategy="no",
    report_to="none",
)
trainer = DPOTrainer(
    policy,
    ref_model=None,  # a copy of the policy as it starts
    args=config,
    train_dataset=rows.map(conversation),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(out)
tokenizer.save_pretrained(out)
