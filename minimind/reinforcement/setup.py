"""Putting an environment together from what a stage is given."""

from pathlib import Path

from minimind.chat.tokenizer import ChatTokenizer
from minimind.compute.device import limit_matmul_cache
from minimind.model.transformer import Transformer
from minimind.reinforcement.environment import Environment
from minimind.reinforcement.loop import ReinforcementConfig
from minimind.reinforcement.reward_scorer import load_reward_model
from minimind.reinforcement.rewards import Rewards, load_custom_reward
from minimind.reinforcement.rollout import SamplingConfig
from minimind.tasks.problem import encode_prompts, read_problems
from minimind.training.run import Run


def build_environment(
    config: ReinforcementConfig,
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Path,
    run: Run,
) -> Environment:
    """Prompts, sampling and those rewards that have a weight.

    Raises:
        UserError: prompts, reward model or custom reward cannot be used.
    """
    limit_matmul_cache()  # every rollout has other numbers of rows and tokens
    weights = config.rewards.weights()
    problems = read_problems(prompts, needs_answers="answer" in weights)
    encoded = encode_prompts(problems, tokenizer, model.config.max_positions)
    rewards = Rewards(
        config.rewards,
        config.max_new_tokens,
        load_reward_model(
            config.reward_model, config.hub_reward_model, config.trust_remote_code, run.device
        )
        if "reward_model" in weights
        else None,
        load_custom_reward(config.custom_reward) if "custom" in weights else None,
    )
    sampling = SamplingConfig(
        config.temperature,
        config.top_p,
        config.max_new_tokens,
        config.dtype,
        config.seed,
        tokenizer.end_id,
    )
    return Environment(problems, encoded, tokenizer, sampling, rewards, run.processes)
