"""TRL's PPO, in 1.12.0, on the exported SFT and reward models, with our settings (ppo.py at size
cpu). What differs: policy and value model share one optimizer, and a response without <|end|> loses
5 instead of scoring -5.

    pip install trl==1.12.0                                  (later releases have no PPO)
    python -m data.huggingface export exported/sft --stage sft
    python -m data.huggingface export exported/reward_model --stage reward_model
    python assets/peers/trl_ppo.py exported/sft exported/reward_model \\
        out/cpu/reward_model/pairs.jsonl exported/trl-ppo
    python -m data.huggingface load exported/trl-ppo --stage ppo --name ppo-trl
    python best_of_n.py --policies ppo,ppo-trl
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

start, reward_model, pairs, out = sys.argv[1:]
GPU = torch.cuda.is_available()


def prompt(row):
    """The ids of a row's prompt in the chat format."""
    messages = [{"role": "user", "content": row["prompt"]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return {"input_ids": ids}


def language_model():
    return AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)


def scalar_model():
    return AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)


tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
policy = language_model()
reference = language_model()
rewards = scalar_model()
values = scalar_model()
rows = load_dataset("json", data_files=pairs, split="train")
rows = rows.map(prompt, remove_columns=rows.column_names)

config = PPOConfig(
    out,
    total_episodes=6400,
    per_device_train_batch_size=64,
    num_mini_batches=4,
    num_ppo_epochs=1,
    local_rollout_forward_batch_size=64,
    learning_rate=3e-4,
    adam_beta2=0.95,
    kl_coef=0.2,
    cliprange=0.2,
    cliprange_value=0.5,
    gamma=1.0,
    lam=0.9,
    temperature=1.0,
    response_length=96,
    stop_token="eos",
    missing_eos_penalty=5.0,
    num_sample_generations=0,
    gradient_checkpointing=False,
    bf16=GPU,
    use_cpu=not GPU,
    seed=1,
    save_strategy="no",
    report_to="none",
)
trainer = PPOTrainer(config, tokenizer, policy, reference, rewards, rows, values)
trainer.train()
policy.save_pretrained(out)
tokenizer.save_pretrained(out)
