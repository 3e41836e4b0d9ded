"""Rejection-sampling fine-tuning after RL (ECE 7115, "RSFT": often used along with RL;
DeepSeek-R1): best_of_n.py --finetune per_prompt, but from PPO's policy and on its samples.

    python -m assets.claims.in_turn --out OUT [--seed S]                after ppo.py
    python best_of_n.py --finetune per_prompt                           RSFT alone
    python ppo.py --start rsft-per_prompt --name ppo-after_rsft         the other way round
    python best_of_n.py --policies ppo,rsft-per_prompt,ppo-after_rsft,rsft-after_ppo

Saves the policy to OUT/SIZE/rsft-after_ppo, where best_of_n.py finds it.
"""

import random

import best_of_n
from data.corpus import draw_requests
from data.files import checksum, run_script
from data.run import Parser, SilentRun, positive, stage_folder
from data.tokenizer import encode_demonstrations
from gpt import save_checkpoint
from sft import fine_tune


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rsft_prompts", type=positive, default=best_of_n.Config.rsft_prompts)
    arguments = parser.parse_args(argv)
    sizes = best_of_n.GPU if arguments.size == "gpu" else {}
    config = best_of_n.Config(out=arguments.out, size=arguments.size, seed=arguments.seed,
                              **sizes)

    policies, reward_model, tokenizer = best_of_n.load_policies(config, ["ppo"], "rsft-after_ppo")
    policy = policies["ppo"].model
    rng = random.Random(f"in turn {config.seed}")
    prompts = draw_requests(arguments.rsft_prompts, rng)
    samples = best_of_n.draw("ppo", policies["ppo"], reward_model, tokenizer, prompts, config.n,
                             config, False, rng)
    rows, _ = best_of_n.select(prompts, samples, "per_prompt", tokenizer, policy.config.block_size)
    demonstrations, _ = encode_demonstrations(rows, tokenizer, policy.config.block_size)
    run = SilentRun()
    fine_tune(policy, demonstrations, [], None, config, rng, run)
    print(f"loss {run.rows[-1]['loss']:.3f} nats a token, on {len(demonstrations):,} answers")

    folder = stage_folder(config, "rsft-after_ppo")
    folder.mkdir(exist_ok=True)
    made_from = {}
    for stage in ("sft", "reward_model", "ppo"):
        name = f"{stage}/checkpoint.pt"
        made_from[name] = checksum(folder.parent / name)
    save_checkpoint(folder / "checkpoint.pt", "rsft", config.size, policy, tokenizer,
                    missing_end_score=config.missing_end_score, made_from=made_from)
    print(f"saved {folder / 'checkpoint.pt'}")


if __name__ == "__main__":
    run_script(main)
