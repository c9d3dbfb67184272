"""Reward functions: TRL's signature, several of them weighted, and every fault named or left out, never averaged in."""

from .functions import OWN_COLUMNS, PROMPT_INDEX, RewardError, RewardFunction, Rewards, Scored, load_reward, logger

__all__ = ["OWN_COLUMNS", "PROMPT_INDEX", "RewardError", "RewardFunction", "Rewards", "Scored", "load_reward", "logger"]
