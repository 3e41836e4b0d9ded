#!/bin/sh
# Every run behind the README's figures, in order; what is there already is skipped. From the repository's root:
#
#     sh assets/experiments.sh && python assets/figures.py out/seed1 out/seed2 out/seed3
#
# About five hours on two cores, one seed a core (SEEDS="1 3" beside SEEDS=2). A run that was interrupted goes on.
set -eu
export OMP_NUM_THREADS=1

run() {  # script, name of the folder, flags: what it prints goes to OUT/cpu/NAME.txt
    script=$1 name=$2
    shift 2
    [ -e "$out/cpu/$name/checkpoint.pt" ] && return
    mkdir -p "$out/cpu"
    python "$script" --size cpu --out "$out" --seed "$seed" "$@" --resume > "$out/cpu/$name.txt"
}

for seed in ${SEEDS:-1 2 3}; do
    out=out/seed$seed

    # The pipeline
    run gpt.py gpt
    run sft.py sft
    run reward_model.py reward_model
    run ppo.py ppo
    run dpo.py dpo

    [ -e "$out/cpu/learning_curve.txt" ] ||
        python reward_model.py --size cpu --out "$out" --seed "$seed" --learning_curve > "$out/cpu/learning_curve.txt"

    # Policy gradients: 6,400 responses each
    run ppo.py ppo-ppo_penalty --name ppo-ppo_penalty --method ppo_penalty
    run ppo.py ppo-a2c --name ppo-a2c --method a2c
    run ppo.py ppo-reinforce --name ppo-reinforce --method reinforce --lr 1.5e-4
    run ppo.py ppo-reinforce_baseline --name ppo-reinforce_baseline --method reinforce_baseline
    run ppo.py ppo-leave_one_out --name ppo-leave_one_out --method reinforce_baseline --baseline leave_one_out --group 4
    run ppo.py ppo-grpo --name ppo-grpo --method grpo --lr 1.5e-4
    run ppo.py ppo-grpo-no_scale --name ppo-grpo-no_scale --method grpo --no-scale --lr 1.5e-4
    run ppo.py ppo-grpo-rewards --name ppo-grpo-rewards --method grpo --no-scale --kl rewards --lr 1.5e-4
    run ppo.py ppo-grpo-tokens --name ppo-grpo-tokens --method grpo --no-scale --kl rewards --mean tokens --lr 1.5e-4
    run ppo.py ppo-ptx --name ppo-ptx --ptx 0.5
    run ppo.py ppo-beta0 --name ppo-beta0 --beta 1e-6

    # Right or wrong, without a reward model
    run ppo.py ppo-verifier --name ppo-verifier --reward verifier
    run ppo.py ppo-verifier-grpo --name ppo-verifier-grpo --reward verifier --method grpo --lr 1.5e-4

    # A reward for every sentence
    run reward_model.py process_model --process
    run ppo.py ppo-process --name ppo-process --reward process

    # Direct methods: 10,240 comparisons each; RSFT: 16,384 samples
    run dpo.py dpo-ipo --name dpo-ipo --loss ipo
    run dpo.py dpo-kto --name dpo-kto --loss kto
    run dpo.py dpo-simpo --name dpo-simpo --loss simpo
    run dpo.py dpo-orpo --name dpo-orpo --loss orpo
    run dpo.py dpo-online --name dpo-online --online 5
    run best_of_n.py rsft-per_prompt --finetune per_prompt
    run best_of_n.py rsft-overall --finetune overall

    # All of them on the same held-out prompts, in groups: the cost grows with the square of their number
    yardstick() {  # name of the group, policies, flags
        group=$1 policies=$2
        shift 2
        [ -e "$out/cpu/best_of_n-$group/metrics.jsonl" ] && return
        python best_of_n.py --size cpu --out "$out" --seed "$seed" --policies "$policies" "$@" > "$out/cpu/best_of_n-$group.txt"
        mkdir -p "$out/cpu/best_of_n-$group"
        cp "$out/cpu/best_of_n/metrics.jsonl" "$out/cpu/best_of_n-$group/"
    }
    yardstick 1-pipeline ppo,dpo
    yardstick 2-methods ppo-ppo_penalty,ppo-a2c,ppo-reinforce,ppo-reinforce_baseline,ppo-leave_one_out --samples 32
    yardstick 3-grpo ppo-grpo,ppo-grpo-no_scale,ppo-grpo-rewards,ppo-grpo-tokens,ppo-ptx --samples 32
    yardstick 4-direct dpo-ipo,dpo-kto,dpo-simpo,dpo-orpo --samples 32
    yardstick 5-online dpo-online,rsft-per_prompt,rsft-overall --samples 32
    yardstick 6-verifier ppo-verifier,ppo-verifier-grpo --samples 32 --verify
    yardstick 7-process ppo-process --samples 32 --process
done
