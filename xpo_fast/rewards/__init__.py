"""Rewards: reward functions here; judges, reward models, their training and their reports in the files of this folder."""

from .functions import OWN_COLUMNS, PROMPT_INDEX, RewardError, RewardFunction, Rewards, Scored, load_reward

__all__ = ["OWN_COLUMNS", "PROMPT_INDEX", "RewardError", "RewardFunction", "Rewards", "Scored", "load_reward"]
