"""A neural probabilistic language model (https://www.jmlr.org/papers/v3/bengio03a.html)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lading import Family, ModelHubAccessor, ParallelPlan, Rule, Split


@dataclass(kw_only=True)
class NPLMConfig:
    vocab_size: int = 16_384
    context: int = 5
    """The number of words from which the next one is predicted."""
    model_dim: int = 60
    hidden_dim: int = 100


class NPLM(nn.Module):
    def __init__(self, config: NPLMConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        self.hidden = nn.Linear(config.context * config.model_dim, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size)

    def forward(self, words: Tensor) -> Tensor:
        """Word ids (N, context) → logits of the next word (N, vocab_size)."""
        return self.output(torch.tanh(self.hidden(self.embed(words).flatten(1))))


@torch.no_grad()
def init(model: NPLM, config: NPLMConfig, name: str, parameter: Tensor) -> None:
    if name == "embed.weight":
        parameter.uniform_(-0.01, 0.01)
    elif name.endswith("bias"):
        parameter.zero_()
    else:
        nn.init.xavier_uniform_(parameter)


def plan(config: NPLMConfig) -> ParallelPlan:
    return ParallelPlan(
        tensor={"embed": Split.VOCABULARY, "hidden": Split.COLUMN, "output": Split.ROW},
        divisible={"vocab_size": config.vocab_size, "hidden_dim": config.hidden_dim},
        units=(),
    )


# From the names in the paper to the names of the parameters.
RULES = (
    Rule("C", "embed.weight"),
    Rule("H", "hidden.weight"),
    Rule("d", "hidden.bias"),
    Rule("U", "output.weight"),
    Rule("b", "output.bias"),
)

FAMILY = Family(
    name="nplm",
    kls=NPLM,
    config_kls=NPLMConfig,
    build=NPLM,
    init=init,
    rules=lambda config: RULES,
    parallel_plan=plan,
)

get_nplm_model_hub = ModelHubAccessor("nplm", NPLM, NPLMConfig)
