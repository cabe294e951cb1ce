"""A reward model: learn from preference pairs to score a conversation."""

from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model
from minimind.model.reward import RewardModel, dense_part
from minimind.model.reward_checkpoint import save_reward_model
from minimind.objectives.reward_model import PairwiseReward
from minimind.params import UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.fit import fit, summary
from minimind.training.run import start_training
from stages._shared import PARAMS, EncodedPairs, File
from stages._supervised import SupervisedConfig, open_dataset

app = stage_app("reward")


class RewardConfig(SupervisedConfig):
    """The `reward` section."""

    init: UserPath  # the path of the checkpoint to start from; of a mixture, its dense part


@app.command()
def main(
    preferences: EncodedPairs, output: File, metrics: File, history: File, params: File = PARAMS
) -> None:
    """Train a score that is higher for the chosen side of a pair."""
    config = load_section(params, "reward", RewardConfig)
    with start_training("reward", params, {"reward": config}, [config.init, preferences]) as run:
        base = load_model(config.init)
        model = RewardModel(dense_part(base, config.seed) if base.config.num_experts else base)
        dataset = open_dataset(preferences, config.init, "preference")
        trained = fit(model, PairwiseReward(), dataset, config, run)
        results = summary(trained)
        if "val_accuracy" in results:
            results["pair_accuracy"] = results.pop("val_accuracy")
        with run.saving(metrics):
            save_reward_model(output, model, config.init)
            write_history(history, trained.rows)
            write_metrics(metrics, "reward", results)


if __name__ == "__main__":
    app()
