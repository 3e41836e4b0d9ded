"""The lecture's own numbers, beside ours.

    python -m tests.lecture

Prints every number that the documents of the course work out by hand, and ours, rounded likewise.
Where a slide has a formula only, the document's number is that, worked out.
"""

import math

import torch

from best_of_n import best_of_n_kl, top_k_overall, top_per_prompt
from data.answer_key import pooled_log_weights
from dpo import dpo_loss
from ppo import clipped_policy_loss, gae
from reward_model import bradley_terry_loss

# Where a document is wrong: {quantity: why}.
SLIPS = {"π*(y_1)": "rounded too early", "π*(y_2)": "rounded too early",
         "H(π*) at β = 4.93": "not monotone in β", "A = -2, ρ = 0.5": "(1+ε)A for (1-ε)A"}


def double(*xs):
    return torch.tensor(xs, dtype=torch.float64)


def optimum(beta):
    """Z, π*(y_1), π*(y_2), from ten samples of π_ref: six times y_1, four times y_2."""
    rewards = double(*[1.0] * 6, *[3.0] * 4)[None]  # (1, S)
    log_ratios = torch.zeros(1, 10, 1).double()     # (1, S, K): log π_ref/π_ref
    w = pooled_log_weights(rewards, log_ratios, beta).exp()[0]
    Z = w.sum().item()
    return Z, w[:6].sum().item() / Z, w[6:].sum().item() / Z


def logit(loss):
    """z, of -log σ(z)."""
    return -math.log(math.exp(loss) - 1)


def from_preferences():
    """The reward model, the optimum, DPO."""
    where = "CS 224R, Lecture 9, ch. 6, Hand Calculation: Reward Model in Action"
    loss = bradley_terry_loss(double(2.5), double(1.0)).item()
    flipped = bradley_terry_loss(double(1.0), double(2.5)).item()
    rows = [(where, "P(y_w ≻ y_l) at r = 2.5, 1.0", "0.818", math.exp(-loss)),
            (where, "its loss", "0.201", loss),
            (where, "P at r = 1.0, 2.5", "0.182", math.exp(-flipped)),
            (where, "its loss", "1.70", flipped)]

    where = "ECE 7115, 13. RLHF, The Bradley-Terry Model"
    P = math.exp(2.5) / (math.exp(2.5) + math.exp(1.0))
    rows.append((where, "p_i/(p_i + p_j), p = e^2.5 and e^1.0", f"{P:.4f}", math.exp(-loss)))

    where = "CS 224R, Lecture 9, ch. 7, Hand Calculation: Boltzmann Reweighting"
    Z, first, second = optimum(beta=2.0)
    rows += [(where, "w_1 = 0.6 exp(1/2)", "0.989", first * Z),
             (where, "w_2 = 0.4 exp(3/2)", "1.793", second * Z),
             (where, "Z", "2.782", Z),
             (where, "π*(y_1)", "0.355", first),
             (where, "π*(y_2)", "0.645", second)]

    where = "CS 224R, Lecture 9, ch. 7, KL Penalty Effect on Generation Diversity"
    for beta, name, document in ((1e9, "∞", "0.673"), (4.93, "4.93", "< 0.673"),
                                 (2.0, "2", ""), (0.1, "0.1", "0.000")):
        Z, first, second = optimum(beta)
        H = -first * math.log(first) - second * math.log(second)
        cross_entropy = -first * math.log(0.6) - second * math.log(0.4)  # H(π*, π_ref)
        formula = cross_entropy - (first + 3 * second) / beta + math.log(Z)
        rows.append((where, f"H(π*) at β = {name}", document or f"{formula:.3f}", H))

    where = "CS 224R, Lecture 9, ch. 8, Hand Calculation: DPO Loss"
    zero = double(0.0)  # the other response at π_ref, and β = 1: z is one log-ratio
    winner = dpo_loss(double(-15.2), zero, double(-16.0), zero, beta=1.0).item()
    loser = dpo_loss(zero, double(-14.8), zero, double(-14.5), beta=1.0).item()
    loss = dpo_loss(double(-15.2), double(-14.8), double(-16.0), double(-14.5), beta=0.1).item()
    return rows + [(where, "log π_θ(y_w)/π_ref(y_w)", "0.8", logit(winner)),
                   (where, "log π_θ(y_l)/π_ref(y_l)", "-0.3", -logit(loser)),
                   (where, "DPO logit", "0.11", logit(loss)),
                   (where, "σ(0.11)", "0.527", math.exp(-loss)),
                   (where, "loss", "0.640", loss)]


def of_selection():
    """Rejection sampling, best-of-N."""
    where = "ECE 7115, 13. RLHF, Rejection Sampling"
    R = torch.tensor([[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.6, 0.5], [0.9, 0.3, 0.4, 0.7],
                      [0.2, 0.5, 0.8, 0.6], [0.5, 0.4, 0.3, 0.6]])
    best = (top_per_prompt(R) + 1).tolist()
    kept = {prompt: [] for prompt in range(5)}
    for prompt, completion in top_k_overall(R, 5).tolist():
        kept[prompt].append(round(R[prompt, completion].item(), 1))
    rows = [(where, "S(R), top per prompt", "[1, 2, 1, 3, 4]", str(best)),
            (where, "top 5 overall: of prompt 3", "[0.9, 0.7]", str(kept[2])),
            (where, "top 5 overall: of prompt 5", "[]", str(kept[4]))]

    where = "Best-of-N, of 10,000 responses, by definition (in no document; Stiennon et al. 2020)"
    for n in (1, 2, 4, 8, 16, 32, 64):
        p = (torch.arange(10_001).double() / 10_000).pow(n).diff()  # P(the i-th is the best of n)
        kl = torch.special.xlogy(p, 10_000 * p).sum().item()
        rows.append((where, f"KL at N = {n}", f"{kl:.2f}", best_of_n_kl(n)))
    return rows


def of_ppo():
    """Clipping, advantages, memory."""
    where = "ECE 7115, 13. RLHF, PPO Clipped Objective, ε = 0.2"
    rows = []
    for A, ratio, document in (
            (2.0, 0.5, "1.00, gradient"), (2.0, 1.1, "2.20, gradient"), (2.0, 1.5, "2.40, none"),
            (-2.0, 0.5, "-2.40, none"), (-2.0, 1.1, "-2.20, gradient"),
            (-2.0, 1.5, "-3.00, gradient"), (0.0, 1.5, "0.00, none")):
        logprobs = double(math.log(ratio) - 1.5)[None].requires_grad_()
        loss, _ = clipped_policy_loss(
            logprobs, double(-1.5)[None], double(A)[None], torch.tensor([[True]]), clip=0.2)
        loss.backward()
        gradient = "gradient" if logprobs.grad != 0 else "none"
        ours = f"{0 - loss.item():.2f}, {gradient}"
        rows.append((where, f"A = {A:g}, ρ = {ratio}", document, ours))

    where = "ECE 7115, 13. RLHF, GAE: γ = 0.9, r = -0.1, -0.2, 0.9, V = 0.4, 0.5, 0.7"
    r = [-0.1, -0.2, 0.9]
    V = [0.4, 0.5, 0.7, 0.0]  # the last is V(terminal)
    A = 0.0
    mean = 0.0
    for k, weight in ((1, 0.5), (2, 0.25), (3, 0.25)):  # λ = 0.5; the last takes all that is left
        A += 0.9 ** (k - 1) * (r[k - 1] + 0.9 * V[k] - V[k - 1])
        mean += weight * A
        rewards = double(*r[:k])[None]
        rewards[0, -1] += 0.9 * V[k]  # the response stops after k tokens, and earns V
        mask = torch.ones(1, k, dtype=torch.bool)
        ours, _ = gae(rewards, double(*V[:k])[None], mask, gamma=0.9, lam=1.0)
        rows.append((where, f"Â^({k}) of the first token", f"{A:.4f}", ours[0, 0].item()))
    G = r[0] + 0.9 * r[1] + 0.81 * r[2]
    rows.append((where, "all steps: G - V", f"{G - V[0]:.4f}", ours[0, 0].item()))
    ours, _ = gae(double(*r)[None], double(*V[:3])[None], mask, gamma=0.9, lam=0.5)
    rows.append((where, "their mean with λ = 0.5", f"{mean:.4f}", ours[0, 0].item()))

    where = "ECE 7115, 13. RLHF, RLHF Training with PPO: 7B parameters in fp16"
    model = torch.empty(7 * 10 ** 9, dtype=torch.float16, device="meta")
    gigabytes = 4 * model.numel() * model.element_size() / 1e9
    return rows + [(where, "GB of PPO's four models", "56", gigabytes)]


def table():
    """[(where, quantity, the document's number, ours)], as texts."""
    rows = []
    for where, quantity, document, ours in from_preferences() + of_selection() + of_ppo():
        decimals = len(document.partition(".")[2])
        if not isinstance(ours, str):
            ours = f"{ours:.{decimals}f}"
        rows.append((where, quantity, document, ours))
    return rows


def main():
    print(f"{49 * ' '}document{12 * ' '}ours")
    above = None
    for where, quantity, document, ours in table():
        if where != above:
            print(where)
            above = where
        verdict = "agrees" if document == ours else f"slip: {SLIPS.get(quantity, '?')}"
        print(f"  {quantity:38s}{document:>17s}{ours:>16s}  {verdict}")


if __name__ == "__main__":
    main()
