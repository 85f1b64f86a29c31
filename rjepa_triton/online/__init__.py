"""Learning while running: the online learner, what it carries of the past, and how true its gradient is."""

from .learner import FORMS, GAMMA_DTYPES, LEARNERS, LEARNING, ONLY_FORM, Form, Learning, OnlineLearner

__all__ = ["FORMS", "GAMMA_DTYPES", "LEARNERS", "LEARNING", "ONLY_FORM", "Form", "Learning", "OnlineLearner"]
