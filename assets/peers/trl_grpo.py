"""TRL's GRPO on the exported SFT and reward models, with our settings (ppo.py --method grpo at size
cpu). What differs: a response without <|end|> is scored as if it had ended.

    pip install trl                                          (measured with 1.16)
    python -m data.huggingface export exported/sft --stage sft
    python -m data.huggingface export exported/reward_model --stage reward_model
    python assets/peers/trl_grpo.py exported/sft exported/reward_model \\
        out/cpu/reward_model/pairs.jsonl exported/trl-grpo group
    python -m data.huggingface load exported/trl-grpo --stage ppo --name ppo-trl-grpo-group
    python best_of_n.py --policies ppo-grpo,ppo-trl-grpo-group

The last argument: advantages divided by the group's standard deviation, as in the paper (group), or
not (none; compare with ppo.py --method grpo_no_division).
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

start, reward_model, pairs, out, scale = sys.argv[1:]
GPU = torch.cuda.is_available()


def conversation(row):
    """A row's prompt in TRL's conversational form, so that TRL applies the chat format."""
    return {"prompt": [{"role": "user", "content": row["prompt"]}]}


tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
policy = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
rewards = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
rows = load_dataset("json", data_files=pairs, split="train")
rows = rows.map(conversation, remove_columns=rows.column_names)

config = GRPOConfig(
    out,
    max_steps=400,
    per_device_train_batch_size=16,
    steps_per_generation=4,
    num_generations=8,
    learning_rate=1.5e-4,
    adam_beta2=0.95,
    beta=0.2,
    epsilon=0.2,
    scale_rewards=scale,
    loss_type="grpo",
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_completion_length=96,
    gradient_checkpointing=False,
    bf16=GPU,
    use_cpu=not GPU,
    seed=1,
    logging_steps=40,
    save_strategy="no",
    report_to="none",
)
trainer = GRPOTrainer(
    policy,
    rewards,
    config,
    rows,
    processing_class=tokenizer,
    reward_processing_classes=AutoTokenizer.from_pretrained(reward_model),
)
trainer.train()
trainer.save_model(out)
tokenizer.save_pretrained(out)
