"""The mathematics of reinforcement: advantages, losses, the value tracker, and rewards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimind.datasets.batches import Counts, PackedBatch
from minimind.errors import UserError
from minimind.model.generate import Sampling, generate
from minimind.objectives.loss import token_logprobs
from minimind.objectives.policy import PolicyGradient, k3
from minimind.reinforcement.advantages import (
    group_advantages,
    has_signal,
    single_stream_advantages,
)
from minimind.reinforcement.draws import Draws
from minimind.reinforcement.rollout import completion_logprobs, pack_completions
from minimind.reinforcement.value_tracker import TrackerConfig, ValueTracker, Visit, mean_change
from minimind.rewards.custom import load_custom_reward
from minimind.rewards.format import Format
from minimind.rewards.language import Language
from minimind.rewards.length import Length
from minimind.rewards.repetition import Repetition
from minimind.rewards.reward import Given, Reward, Sample
from minimind.rewards.weighted import Rewards, RewardsConfig
from minimind.tasks.problem import Problem
from tests.tiny import VOCAB_SIZE, tiny_model

TRACKER = TrackerConfig(d_half=0.06, rho_min=0.5, rho_max=0.96, initial_samples=2, exploration=0.05)


def random_completions(num_rows: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB_SIZE, rng.integers(1, 9)).tolist() for _ in range(num_rows)]
    answers = [rng.integers(3, VOCAB_SIZE, rng.integers(1, 12)).tolist() for _ in range(num_rows)]
    return prompts, answers


def policy_batches(num_rows: int, rows_at_a_time: int, spread: float) -> list[PackedBatch]:
    """Batches whose old and reference log-probabilities are off the model's by `spread`."""
    prompts, answers = random_completions(num_rows)
    rng = np.random.default_rng(1)
    now = completion_logprobs(tiny_model(), prompts, answers, 1.0, "float32", num_rows)
    advantages = torch.from_numpy(rng.normal(size=num_rows).astype(np.float32))
    sampled = [row + torch.from_numpy(rng.normal(0, spread, len(row))).float() for row in now]
    reference = [row + torch.from_numpy(rng.normal(0, spread, len(row))).float() for row in now]
    batches = []
    for start in range(0, num_rows, rows_at_a_time):
        span = slice(start, start + rows_at_a_time)
        extras = {
            "advantages": advantages[span],
            "old": torch.cat(sampled[span]),
            "reference": torch.cat(reference[span]),
        }
        batches.append(pack_completions(prompts[span], answers[span], extras))
    return batches


def loss_and_gradient(objective, batches) -> tuple[float, torch.Tensor]:
    model = tiny_model()
    totals = Counts(*map(sum, zip(*(batch.counts for batch in batches), strict=True)))
    loss = torch.zeros(())
    for batch in batches:
        for term in objective(model, batch, 0.0).terms.values():
            loss = loss + term.total / getattr(totals, term.per)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


# Advantages


def test_group_advantages_are_the_formula() -> None:
    rewards = np.array([0.0, 1.0, 1.0, 2.5, 3.0, 3.0, 3.0, 4.0])
    one, two = rewards[:4], rewards[4:]
    expected = [(g - g.mean()) / (g.std(ddof=1) + 1e-4) for g in (one, two)]
    np.testing.assert_allclose(group_advantages(rewards, 4, True), np.concatenate(expected))
    centered = np.concatenate([one - one.mean(), two - two.mean()])
    np.testing.assert_allclose(group_advantages(rewards, 4, False), centered)


def test_a_group_of_equal_rewards_teaches_nothing_and_is_counted() -> None:
    # Three times 0.1 has a mean that is not 0.1: rounding must not become a signal.
    rewards = np.array([0.1, 0.1, 0.1, 0.0, 1.0, 1.0])
    assert (np.mean(rewards[:3]) - 0.1) != 0
    advantages = group_advantages(rewards, 3, True)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert (advantages[3:] != 0).all()
    assert has_signal(rewards, 3).tolist() == [False, True]


def test_single_stream_advantages_are_normalized_from_16_samples_on() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.random(16), rng.random(16)
    difference = rewards - values
    np.testing.assert_array_equal(
        single_stream_advantages(rewards[:15], values[:15]), difference[:15]
    )
    expected = (difference - difference.mean()) / (difference.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(single_stream_advantages(rewards, values), expected)


# The loss


def test_k3_is_the_formula_never_negative_and_zero_where_they_agree() -> None:
    logprobs, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    d = reference - logprobs
    torch.testing.assert_close(k3(logprobs, reference), torch.exp(d) - d - 1)
    assert (k3(logprobs, reference) >= 0).all()
    assert k3(logprobs, logprobs).tolist() == [0, 0, 0]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_the_plain_formula(loss_type: str, beta: float) -> None:
    (batch,) = policy_batches(6, 6, spread=0.4)
    objective = PolicyGradient(loss_type, 0.2, beta, 1.0, 40)
    loss = objective(tiny_model(), batch, 0.0)
    logits = tiny_model()(batch.tokens, batch.predict_at).logits
    now = token_logprobs(logits, batch.targets).detach().double().numpy()
    sampled, reference = (batch.extras[n].double().numpy() for n in ("old", "reference"))
    ratio = np.exp(now - sampled)
    advantage = batch.extras["advantages"].double().numpy()[batch.row_of_target]
    kl = np.exp(reference - now) - (reference - now) - 1
    if loss_type == "cispo":
        losses = -np.minimum(ratio, 1.2) * advantage * now
        clipped = ratio > 1.2
    else:
        losses = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        clipped = np.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    assert 0 < clipped.sum() < len(clipped)
    losses = losses + beta * kl
    lengths = np.bincount(batch.row_of_target)
    expected = {
        "grpo": (losses / lengths[batch.row_of_target]).sum(),
        "dr_grpo": losses.sum() / 40,
        "cispo": losses.sum(),
    }[loss_type]
    (term,) = loss.terms.values()
    assert float(term.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert term.per == ("tokens" if loss_type == "cispo" else "rows")
    assert int(loss.metrics["clip_share"].total) == clipped.sum()


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_the_first_update_is_reinforce(loss_type: str) -> None:
    (batch,) = policy_batches(5, 5, spread=0.0)
    _, gradient = loss_and_gradient(PolicyGradient(loss_type, 0.2, 0.0, 1.0, 40), [batch])
    model = tiny_model()
    logprobs = token_logprobs(model(batch.tokens, batch.predict_at).logits, batch.targets)
    weighted = logprobs * batch.extras["advantages"][batch.row_of_target]
    if loss_type == "grpo":
        weighted = weighted / batch.row_of_target.bincount()[batch.row_of_target]
        (-weighted.sum() / 5).backward()
    else:
        (-weighted.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, expected)


def test_a_clipped_token_has_no_gradient_in_grpo_and_keeps_it_in_cispo() -> None:
    (batch,) = policy_batches(4, 4, spread=0.0)
    # As if every token had become e times likelier since it was drawn, and good at that.
    moved = replace(
        batch,
        extras={"old": batch.extras["old"] - 1, "advantages": torch.ones(4)},
    )
    _, clipped = loss_and_gradient(PolicyGradient("grpo", 0.2, 0.0, 1.0, 40), [moved])
    _, kept = loss_and_gradient(PolicyGradient("cispo", 0.2, 0.0, 1.0, 40), [moved])
    assert clipped.abs().max() == 0
    assert kept.abs().max() > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo"])
def test_micro_batches_are_one_big_batch(loss_type: str) -> None:
    objective = PolicyGradient(loss_type, 0.2, 0.1, 1.0, 40)
    big = loss_and_gradient(objective, policy_batches(10, 10, spread=0.3))
    small = loss_and_gradient(objective, policy_batches(10, 3, spread=0.3))
    assert small[0] == pytest.approx(big[0], rel=1e-5)
    torch.testing.assert_close(small[1], big[1])


def test_only_the_completion_is_trained_on_up_to_its_end_token() -> None:
    batch = pack_completions([[5, 6], [7]], [[8, 2], [9, 10, 11]], {})
    assert batch.tokens.ids.tolist() == [5, 6, 8, 2, 7, 9, 10, 11]
    assert batch.tokens.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.tokens.boundaries.tolist() == [0, 4, 8]
    assert batch.targets.tolist() == [8, 2, 9, 10, 11]
    assert batch.predict_at.tolist() == [1, 2, 4, 5, 6]
    assert batch.row_of_target.tolist() == [0, 0, 1, 1, 1]
    assert batch.counts == Counts(tokens=5, rows=2, samples=2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_sampling_records_is_what_the_loss_computes(temperature: float) -> None:
    """Prompts of different lengths in one batch: no padding leaks into sampling or scoring."""
    model = tiny_model()
    prompts, _ = random_completions(5)
    drawn = generate(
        model,
        prompts,
        max_new_tokens=12,
        end_id=2,
        dtype="float32",
        sampling=Sampling(temperature, 1.0, 7, range(10)),
        num_samples_per_prompt=2,
        with_logprobs=True,
    )
    repeated = [prompt for prompt in prompts for _ in range(2)]
    for rows_at_a_time in (10, 1):
        scored = completion_logprobs(
            model, repeated, drawn.ids, temperature, "float32", rows_at_a_time
        )
        for row, values in enumerate(scored):
            torch.testing.assert_close(values, torch.tensor(drawn.logprobs[row]))


# SPO's value tracker


def tracker_with(a: list[float], b: list[float]) -> ValueTracker:
    tracker = ValueTracker(TRACKER, len(a))
    tracker.a, tracker.b = np.array(a), np.array(b)
    return tracker


def test_the_tracker_starts_from_initial_samples() -> None:
    tracker = ValueTracker(TRACKER, 3)
    rewards = np.array([[1.0, 1.0], [0.0, 0.5]])
    tracker.initialize(np.array([0, 2]), rewards, [Visit([4], [-1.0]), Visit([5], [-2.0])])
    # 1/(1 - 0.5) = 2 observations, in the ratio (successes + 0.5) : (failures + 0.5).
    np.testing.assert_allclose(tracker.a[[0, 2]], [2 * 2.5 / 3, 2 * 1.0 / 3])
    np.testing.assert_allclose((tracker.a + tracker.b)[[0, 2]], [2.0, 2.0])
    assert tracker.visits[2] == Visit([5], [-2.0])


def test_the_tracker_forgets_by_how_far_the_policy_moved() -> None:
    tracker = tracker_with([3.0, 3.0, 3.0], [1.0, 1.0, 1.0])
    change = np.array([0.0, 0.06, 0.03])
    rewards = np.array([1.0, 0.0, 0.25])
    rho = tracker.update(np.arange(3), rewards, change, [Visit([1], [0.0])] * 3)
    # Unmoved: at most rho_max is kept. One half-life: rho_min is 0.5 here. Half of one: sqrt(1/2).
    np.testing.assert_allclose(rho, [0.96, 0.5, 2**-0.5])
    np.testing.assert_allclose(tracker.a, rho * 3 + rewards)
    np.testing.assert_allclose(tracker.b, rho * 1 + (1 - rewards))
    assert tracker.rho(np.array([9.0])).tolist() == [0.5]


def test_uncertain_prompts_are_drawn_more() -> None:
    tracker = tracker_with([1.0, 5.0, 9.9], [9.0, 5.0, 0.1])
    values = np.array([0.1, 0.5, 0.99])
    np.testing.assert_allclose(tracker.values(), values)
    np.testing.assert_allclose(tracker.weights(), np.sqrt(values * (1 - values)) + 0.05)
    draws = Draws(num_prompts=3, prompts_per_step=1, seed=1)
    counts = np.bincount(
        [int(draws.by_weight(step, tracker.weights())[0]) for step in range(2000)], minlength=3
    )
    shares = tracker.weights() / tracker.weights().sum()
    np.testing.assert_allclose(counts / 2000, shares, atol=0.04)


def test_a_weighted_draw_takes_each_prompt_once_and_depends_on_the_step_alone() -> None:
    draws = Draws(num_prompts=20, prompts_per_step=8, seed=1)
    weights = np.linspace(0.1, 1, 20)
    drawn = [draws.by_weight(step, weights).tolist() for step in range(5)]
    assert all(len(set(prompts)) == 8 for prompts in drawn)
    assert len({tuple(prompts) for prompts in drawn}) == 5
    assert draws.by_weight(3, weights).tolist() == drawn[3]
    assert len(Draws(5, 8, 1).by_weight(0, np.ones(5))) == 5


def test_prompts_in_turn_come_once_an_epoch() -> None:
    draws = Draws(num_prompts=10, prompts_per_step=4, seed=1)
    assert draws.num_steps(epochs=2.0, max_steps=0) == 6
    assert draws.num_steps(epochs=2.0, max_steps=3) == 3
    for epoch in (0, 1):
        seen = [i for k in range(3) for i in draws.in_turn(3 * epoch + k).tolist()]
        assert sorted(seen) == list(range(10))
    assert draws.in_turn(0).tolist() != draws.in_turn(3).tolist()


def test_the_tracker_survives_its_state() -> None:
    tracker = tracker_with([1.0, 5.0], [9.0, 5.0])
    tracker.visits = [Visit([4, 5, 6], [-0.1, -0.2, -0.3]), Visit([7], [-1.5])]
    other = ValueTracker(TRACKER, 2)
    other.load_state_tensors(tracker.state_tensors())
    assert other.visits == tracker.visits
    assert (other.a.tolist(), other.b.tolist()) == (tracker.a.tolist(), tracker.b.tolist())


def test_change_is_the_mean_absolute_difference() -> None:
    assert mean_change([-1.0, -2.0], torch.tensor([-1.5, -1.0])) == pytest.approx(0.75)


# Rewards

COMPLETE = "<think>先算3+4=7</think>\n<answer>7</answer>"


def value_of(
    reward: Reward, completion: str = "", prompt: str = "3+4?", num_tokens: int = 6, **rest: Any
) -> float:
    problem, ids = Problem.of(prompt, "7"), rest.get("ids", list(range(num_tokens)))
    sample = Sample(problem, completion, ids, rest.get("finished", True))
    (value,) = reward.score([sample], Given(max_new_tokens=80))
    low, high = reward.bounds()
    assert low <= value <= high
    return float(value)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (COMPLETE, 1.5),
        ("<think>\n3+4=7\n</think>\n<answer>\n7\n</answer>", 1.5),
        ("<think>3+4=7</think><answer>7</answer>", 1.5),
        ("so: " + COMPLETE, 1.0),  # all tags once, but something before them
        (COMPLETE + " Amy has 7.", 1.0),
        ("<answer>7</answer><think>3+4</think>", 1.0),  # the wrong way round
        ("<think>3+4=7</think>", 0.5),
        ("<think>3+4=7</think><answer>7", 0.75),
        ("<think><think>3</think><answer>7</answer>", 0.75),
        ("小明有7枚贝壳。", 0.0),
    ],
)
def test_format_reward(completion: str, reward: float) -> None:
    assert value_of(Format(), completion) == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (COMPLETE, 1.0),
        ("<answer> 7\n</answer>", 1.0),
        ("<answer>17</answer>", 0.0),
        ("<answer>7.</answer>", 1.0),  # as in evaluation
        ("<answer>7 shells</answer>", 1.0),
        ("<answer>6</answer><answer>7</answer>", 0.0),  # guesses
        ("</answer>7<answer>", 0.0),
        ("<think>7</think>", 0.0),
        ("Amy has 3 and 4, so 7 shells.", 1.0),  # no tag at all: the last number
        ("小明有7枚贝壳，不是17枚。", 0.0),
        ("", 0.0),
    ],
)
def test_answer_reward(completion: str, reward: float) -> None:
    assert float(Problem.of("3+4?", "7").score(completion).correct) == reward


def test_answers_in_chinese_are_compared_exactly() -> None:
    problem = Problem.of("几枚？", "七枚贝壳")
    assert problem.score("<answer>七枚贝壳</answer>").correct
    assert not problem.score("<answer>七枚</answer>").correct


def test_length_costs_nothing_at_first_and_everything_without_an_end() -> None:
    length = Length(free_length=40)
    penalties = [value_of(length, num_tokens=n) for n in (1, 40, 50, 60, 79)]
    assert penalties == pytest.approx([0, 0, -0.25, -0.5, -39 / 40])
    assert value_of(length, num_tokens=80) == -1
    assert value_of(length, num_tokens=5, finished=False) == -1


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    repetition = Repetition(repetition_ngram=2)
    assert value_of(repetition, ids=[1, 2, 3, 4, 5]) == 0
    assert value_of(repetition, ids=[1, 2, 1, 2, 1]) == pytest.approx(-2 / 4)
    assert value_of(repetition, ids=[1]) == 0


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        (
            "小明有3枚贝壳，又捡到4枚，一共几枚？",
            "<think>先算3+4=7</think>\n<answer>7</answer>",
            1.0,
        ),
        ("小明有3枚贝壳，又捡到4枚，一共几枚？", "<think>first 3+4</think>是7枚", 2 / 3),
        ("Amy has 3 shells. How many?", "<think>first add two</think><answer>七</answer>", 0.75),
        ("Amy has 3 shells. How many?", "一共七", 0.0),
        ("Amy has 3 shells. How many?", "<think>3+4=7</think><answer>7</answer>", 1.0),  # no words
        ("3+4=?", "三加四 is seven", 1.0),  # in no language
        ("把 hello 翻译成中文", "你好", 1.0),
    ],
)
def test_language_is_the_share_of_words_in_that_of_the_prompt(
    prompt: str, completion: str, reward: float
) -> None:
    assert value_of(Language(), completion, prompt) == reward


def rewards_config(**changes) -> RewardsConfig:
    values = {
        "format": 0.0,
        "answer": 0.0,
        "length": 0.0,
        "repetition": 0.0,
        "reward_model": 0.0,
        "custom": 0.0,
        "free_length": 4,
        "repetition_ngram": 2,
        "reward_model_clip": 3.0,
    }
    return RewardsConfig(**(values | changes))


def samples_of(*completions: str) -> list[Sample]:
    return [Sample(Problem.of("3+4?", "7"), text, list(range(6)), True) for text in completions]


def test_parts_are_weighted_added_and_scaled_between_their_bounds() -> None:
    config = rewards_config(format=2.0, answer=1.0, length=0.5, reward_model=0.1, custom=0.2)
    given = Given(8, reward_model=lambda s: [9.0, -1.0], custom=lambda p, c, a: len(c) / 100)
    rewards = Rewards(config, given)
    parts = rewards.parts(samples_of(COMPLETE, "?"))
    assert set(parts) == {"format", "answer", "length", "reward_model", "custom"}
    assert parts["format"].tolist() == [1.5, 0.0]
    assert parts["answer"].tolist() == [1.0, 0.0]
    assert parts["length"].tolist() == [-0.5, -0.5]
    assert parts["reward_model"].tolist() == [3.0, -1.0]  # clipped
    totals = rewards.total(parts)
    custom = len(COMPLETE) / 100
    expected = [3.0 + 1.0 - 0.25 + 0.3 + 0.2 * custom, -0.25 - 0.1 + 0.2 * 0.01]
    np.testing.assert_allclose(totals, expected)
    low, high = -0.5 - 0.3 - 0.2, 3.0 + 1.0 + 0.3 + 0.2
    np.testing.assert_allclose(rewards.scaled(totals), (totals - low) / (high - low))


@pytest.mark.parametrize("value", [1.5, float("nan"), "good", None])
def test_a_custom_reward_out_of_bounds_is_one_line(value: object) -> None:
    rewards = Rewards(rewards_config(custom=1.0), Given(8, custom=lambda p, c, a: value))
    with pytest.raises(UserError, match="must be a number from -1 to 1"):
        rewards.parts(samples_of("7"))


def test_a_custom_reward_is_a_file_of_the_project(tmp_path: Path, monkeypatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    good = "def score(prompt, completion, answer):\n    return 1.0 if answer in completion else 0\n"
    (project / "mine.py").write_text(good)
    assert load_custom_reward(Path("mine.py"))("3+4?", "7", "7") == 1.0
    with pytest.raises(UserError, match=r"score failed on the prompt '3\+4\?': TypeError"):
        load_custom_reward(Path("mine.py"))("3+4?", "7", None)
    (tmp_path / "outside.py").write_text(good)
    for name, problem in [
        ("../outside.py", "inside of"),
        ("absent.py", "is missing"),
        ("mine.txt", "must be a .py file"),
    ]:
        with pytest.raises(UserError, match=problem):
            load_custom_reward(Path(name))
    (project / "empty.py").write_text("")
    with pytest.raises(UserError, match="has no function score"):
        load_custom_reward(Path("empty.py"))
    (project / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError"):
        load_custom_reward(Path("broken.py"))


def test_some_reward_must_count() -> None:
    with pytest.raises(ValueError, match="at least one weight must be above 0"):
        rewards_config()
