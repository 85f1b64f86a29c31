"""Learning while running: the online learner, what it carries of the past, how exact its gradient is."""

from .compiled import LEARNERS
from .learner import OnlineLearner
from .options import FORMS, GAMMA_DTYPES, LEARNING, ONLY_FORM, Form, Learning

__all__ = ["FORMS", "GAMMA_DTYPES", "LEARNERS", "LEARNING", "ONLY_FORM", "Form", "Learning", "OnlineLearner"]
