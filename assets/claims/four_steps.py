"""Four steps on the samples of one policy, without a ratio (ECE 7115, "Two Old Policies"): A2C on
PPO's batches of 64 responses in minibatches of 16, as many responses and steps as with one step
on each batch of 16.

    python -m assets.claims.four_steps --out OUT [--seed S]         after reward_model.py
    python ppo.py --method a2c --name ppo-a2c                       one step a batch
    python best_of_n.py --policies ppo-a2c,ppo-a2c-four_steps

Saves the policy to OUT/SIZE/ppo-a2c-four_steps, where best_of_n.py finds it.
"""

from unittest import mock

import ppo
from data.files import run_script
from data.run import Parser

one_step = ppo.minibatches


def four_steps(count, epochs, size, rng, device):
    """The batch in four parts. ppo.py has no flag for it: without a ratio it must not be done."""
    return one_step(count, epochs, size // 4, rng, device)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out", help="the folder of the finished stages")
    parser.add_argument("--size", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--seed", default="1", help="fixes prompts and samples")
    parser.add_argument("--iterations", default="100", help="batches of 64 responses")
    arguments = parser.parse_args(argv)
    with mock.patch("ppo.minibatches", four_steps):
        ppo.main(["--method", "a2c", "--rollouts", "64", "--iterations", arguments.iterations,
                  "--out", arguments.out, "--size", arguments.size, "--seed", arguments.seed,
                  "--name", "ppo-a2c-four_steps"])


if __name__ == "__main__":
    run_script(main)
