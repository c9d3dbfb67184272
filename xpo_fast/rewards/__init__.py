"""Rewards: reward functions; judges, reward models, their training and reports in the files of this folder."""

from .functions import OWN_COLUMNS, PROMPT_INDEX, RewardError, RewardFunction, Rewards, Scored, load_reward

__all__ = ["OWN_COLUMNS", "PROMPT_INDEX", "RewardError", "RewardFunction", "Rewards", "Scored", "load_reward"]
